from __future__ import annotations

import am_loss


def test_all_is_the_documented_names():
    assert am_loss.__all__ == [
        "ChunkLoss",
        "DistillationLoss",
        "Head",
        "chunked",
        "cross_entropy",
        "distillation",
        "linear_cross_entropy",
        "linear_distillation",
    ]
    assert all(callable(vars(am_loss)[name]) for name in am_loss.__all__)
