"""A convolution by its definition, in float64: the oracle of whatever claims to equal one."""

import numpy as np


def convolve(x, weight, bias=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1)):
    """x [N, I, H, W], weight [O, I, kh, kw]; one tap after the other."""
    x = np.pad(np.asarray(x, dtype=np.float64), ((0, 0), (0, 0)) + tuple((p, p) for p in padding), "constant")
    weight = np.asarray(weight, dtype=np.float64)
    height, width = ((x.shape[2 + a] - dilation[a] * (weight.shape[2 + a] - 1) - 1) // stride[a] + 1 for a in (0, 1))
    result = np.zeros((x.shape[0], weight.shape[0], height, width))
    for i in range(weight.shape[2]):
        for j in range(weight.shape[3]):
            top, left = i * dilation[0], j * dilation[1]
            seen = x[:, :, top:top + (height - 1) * stride[0] + 1:stride[0],
                     left:left + (width - 1) * stride[1] + 1:stride[1]]
            result += np.einsum("oi,nihw->nohw", weight[:, :, i, j], seen)
    return result if bias is None else result + np.asarray(bias)[:, None, None]
