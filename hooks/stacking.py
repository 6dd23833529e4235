"""Several compressions in one graph and one session: whoever exports names them all in the parameter file."""
from __future__ import annotations

from typing import Any, Callable, List, Optional

import tensorflow.compat.v1 as tf

#: reads from a session what an algorithm writes to the parameter file; None as long as there is nothing to write
Contribution = Callable[[tf.Session], Optional[Any]]

_CONTRIBUTIONS = "_slimtrain_contributions"


def contribute(graph: tf.Graph, contribution: Contribution) -> None:
    """Let every later export of ``graph`` hold an algorithm beside its own."""
    setattr(graph, _CONTRIBUTIONS, getattr(graph, _CONTRIBUTIONS, ()) + (contribution,))


def contributed(graph: tf.Graph, session: tf.Session) -> List[Any]:
    """The algorithms (``CompressionAlgo``) that were contributed and have something to write."""
    algorithms = [contribution(session) for contribution in getattr(graph, _CONTRIBUTIONS, ())]
    return [algorithm for algorithm in algorithms if algorithm is not None]
