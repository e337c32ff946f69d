"""Memory that a target needs on each of its devices, by formula from its configuration and shape.

Not in it, as no formula gives them: what CUDA, cuBLAS and compiled code take for themselves, and gaps in torch's
cache. Leave one or two GiB of each GPU for them.
"""

from dataclasses import dataclass

from eagle_rpc.sizes.outline import Division
from eagle_rpc.sizes.target import TargetShape

_CAPTURED_LAYERS = 3
_FP32 = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """The work that memory is needed for: requests of B x T tokens, all of them supervised."""

    batch: int
    length: int
    dtype_bytes: int  # of activations
    chunk_rows: int  # rows that are projected onto the vocabulary at a time
    copies_logits: bool  # they are read through a copy in fp32
    eager: bool  # attention makes whole matrices of scores
    reply_bytes: float  # of all replies that wait until they are sent

    @property
    def tokens(self) -> int:
        return self.batch * self.length


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceMemory:
    """Bytes on one device. Not all are held at the same moment, so their sum is an upper bound."""

    weights: float
    activations: float  # of the largest step inside a decoder layer
    under_way: float  # hidden states of all passes under way: captured, last and between devices
    head: float = 0.0  # one chunk of logits
    replies: float = 0.0

    @property
    def total(self) -> float:
        return self.weights + self.activations + self.under_way + self.head + self.replies


def memory_by_device(
    division: Division, shape: TargetShape, load: Load, num_stages: int = 1
) -> list[DeviceMemory]:
    """What each device of a target holds while requests wait: weights, and what passes and replies add.

    A GPU works on one pass at a time, so activations count once. Of N devices N + 1 passes are under way. Of
    several stages each keeps what it captured until it is sent; the last has the head, replies leave from the first.
    """
    last, passes = division.num_devices - 1, division.num_devices + 1
    hidden = load.tokens * shape.hidden_size * load.dtype_bytes
    devices = []
    for number, cost in enumerate(division.costs):
        # Hidden states that come from the device before this one, and those that go to the next.
        between = ((number > 0) + (number < last)) * passes * hidden
        own = {"weights": cost.num_bytes, "activations": activation_bytes(shape, load)}
        per_stage = division.num_devices // num_stages
        ends_stage, replies = (number + 1) % per_stage == 0, number == per_stage - 1
        kept = (passes if replies else ends_stage) * (_CAPTURED_LAYERS + 1) * hidden
        head = load.chunk_rows * shape.vocab_size * (load.dtype_bytes + _FP32 * load.copies_logits)
        devices.append(
            DeviceMemory(
                **own,
                under_way=between + kept,
                head=head if number == last else 0.0,
                replies=load.reply_bytes if replies else 0.0,
            )
        )
    return devices


def activation_bytes(shape: TargetShape, load: Load) -> float:
    """Of the larger of attention and feed-forward block: inputs, normed inputs, and all that is between.

    Attention: queries, keys, values and outputs; eager also scores, and their softmax in fp32 and rounded. The
    feed-forward block: gate, up and their product, of all experts that a token passes, with a copy of the
    token for each of these.
    """
    heads, key_heads = shape.num_attention_heads or 0, shape.num_key_value_heads or 0
    attention = 2.0 * (heads + key_heads) * (shape.head_dim or 0) * load.dtype_bytes
    if load.eager:
        attention += heads * load.length * (2 * load.dtype_bytes + _FP32)
    width = shape.intermediate_size or 4 * shape.hidden_size
    routed = 2 * (shape.experts_per_token or 0) * shape.hidden_size
    feed_forward = (3 * width + routed) * load.dtype_bytes
    return load.tokens * (2 * shape.hidden_size * load.dtype_bytes + max(attention, feed_forward))
