"""One file per op: formula, reference in plain torch, the public function, fake and autograd formula."""
