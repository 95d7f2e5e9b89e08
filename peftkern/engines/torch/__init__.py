"""The ops composed of torch's own, for every device: right by construction, lean, at the speed of the device's library.

Products are in x's dtype with the library's fp32 accumulation, each rounded once. A 4-bit weight is decoded in forward
and again in backward; nothing of size [out, in] outlives a call. Dropout's mask is torch's own, one byte an element.
"""
