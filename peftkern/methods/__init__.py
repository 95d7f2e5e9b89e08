"""The fine-tuning methods by name, one file each."""

from peftkern.methods._method import Method
from peftkern.methods.bitfit import BitFit
from peftkern.methods.dora import DoRA
from peftkern.methods.full import Full
from peftkern.methods.houlsby import Houlsby
from peftkern.methods.ia3 import IA3
from peftkern.methods.lora import LoRA, QLoRA
from peftkern.methods.p_tuning import PTuning
from peftkern.methods.p_tuning_v2 import PTuningV2
from peftkern.methods.prefix_tuning import PrefixTuning
from peftkern.methods.prompt_tuning import PromptTuning

# One line each. A file is read by the first whose `reads` says so.
METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        LoRA(),
        QLoRA(),
        BitFit(),
        Full(),
        DoRA(),
        IA3(),
        PromptTuning(),
        PTuning(),
        Houlsby(),
        PrefixTuning(),
        PTuningV2(),
    )
}
