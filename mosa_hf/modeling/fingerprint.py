"""Which model it is that unfinished work, or a cache, on disk is of."""

import hashlib

from transformers.modeling_utils import PreTrainedModel

NUMBERS = 64  # of a tensor: all of a large model's would take long to read


def model_fingerprint(model: PreTrainedModel) -> str:
    """
    Sixteen hexadecimal digits of the names, shapes and first numbers of all parameters and buffers; of those that are
    offloaded, or quantised tensors of a class of their own, without the numbers.
    """
    digest = hashlib.sha256()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        is_plain = not tensor.is_meta and not hasattr(tensor, "__tensor_flatten__")
        numbers = tensor.detach().flatten()[:NUMBERS].cpu().double().tolist() if is_plain else []
        digest.update(f"{name} {list(tensor.shape)}: {numbers}\n".encode())
    return digest.hexdigest()[:16]
