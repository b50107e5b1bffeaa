"""swav.py, but the code of a view is the softmax of its own scores: without the equal partition.

The claim "swav-partition" of claims.py runs it, to show what the partition is for.
"""

import common
import swav


def softmax(scores, epsilon=0.05):
    """Codes [B, K], each from its own row alone."""
    return (scores / epsilon).softmax(1)


if __name__ == "__main__":
    swav.sinkhorn = softmax
    with common.entry_point("the same command continues from the last checkpoint"):
        swav.main()
