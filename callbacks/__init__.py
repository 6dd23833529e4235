"""slimtrain for PyTorch: compression objects for plain loops and a Lightning callback over each."""

from slimtrain.callbacks.exporting import Deployed, Exported
from slimtrain.callbacks.lsq_callback import LSQQuantizerCallback
from slimtrain.callbacks.lsq_quantizer import LSQQuantizer

__all__ = ["Deployed", "Exported", "LSQQuantizer", "LSQQuantizerCallback"]
