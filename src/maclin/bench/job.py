"""What ``maclin bench`` is asked to measure, checked before anything is measured."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from maclin.core import mechanisms as registry
from maclin.core.errors import MaclinError, OptionError
from maclin.records import Config

from .peers import PEERS, PeerSizes
from .specs import Spec, default_spec, parse_specs

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
WHATS = ("speed", "memory", "decode")
DEFAULT_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
DEFAULT_POSITIONS = (1024, 4096, 16384, 65536)
_LONGEST = 2**31  # numbers of one head that an index of 32 bits reaches; kernels below may use one


@dataclass(frozen=True)
class BenchJob:
    """One run.

    Args:
        what: "speed", "memory" or "decode".
        mechanisms: as ``parse_specs`` reads them; None is every mechanism that can do it.
        lengths: tokens, or with "decode" positions; None is doubled from 512 to 16,384, or 1,024 to 65,536.
        dtype: "float32", "bfloat16", "float16" or "float64", of q, k and v.
        device: "auto", "cpu" or "cuda".
        num_heads: H.
        head_dim: D.
        batch: B.
        backward: forward and backward together.
        causal: causal attention; "decode" always is.
        peers: also measure the packages in ``peers.PEERS`` that are installed.
        peer_features: features of performer-pytorch, slots of linformer, landmarks of nystrom-attention.
        seconds_per_point: wall time for the runs of one subject at one length.
        max_seconds_per_run: longest single run that is still started; None is 10 times ``seconds_per_point``, or a
            minute with "memory".
        only_peers: of the peers those, by their names; empty is all.
        seed: of q, k, v and of what mechanisms draw.

    Raises:
        OptionError: whatever cannot be; the message says what can.
    """

    what: str = "speed"
    mechanisms: str | None = None
    lengths: tuple[int, ...] | None = None
    dtype: str = "float32"
    device: str = "auto"
    num_heads: int = 8
    head_dim: int = 64
    batch: int = 1
    backward: bool = False
    causal: bool = False
    peers: bool = False
    peer_features: int = 128
    seconds_per_point: float = 2.0
    max_seconds_per_run: float | None = None
    only_peers: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.what not in WHATS:
            raise OptionError(f"wanted one of {', '.join(WHATS)}, got {self.what!r}")
        if self.dtype not in DTYPES:
            raise OptionError(f"wanted a dtype of {', '.join(DTYPES)}, got {self.dtype!r}")
        for name in ("num_heads", "head_dim", "batch", "peer_features"):
            if getattr(self, name) < 1:
                raise OptionError(f"wanted {name} of at least 1, got {getattr(self, name)}")
        if not self.seconds_per_point > 0:
            raise OptionError(f"wanted more than 0 seconds for each point, got {self.seconds_per_point}")
        known = [peer.name for peer in PEERS]
        unknown = [name for name in self.only_peers if name not in known]
        if unknown:
            raise OptionError(f"unknown peer {unknown[0]!r}; known are {', '.join(known)}")
        lengths = self.points
        if not lengths or min(lengths) < 1:
            raise OptionError(f"wanted lengths of at least 1 token, got {list(lengths)}")
        if max(lengths) * self.head_dim >= _LONGEST:
            raise OptionError(
                f"wanted fewer than {_LONGEST // self.head_dim:,} tokens of width {self.head_dim}, got {max(lengths):,}"
            )
        if self.what == "decode" and (self.backward or self.peers):
            raise OptionError(
                "decode has neither backward nor peers: one token is decoded with the state of a mechanism"
            )
        _ = self.specs, self.torch_device  # refuse both now

    @property
    def points(self) -> tuple[int, ...]:
        """Lengths or positions, ascending."""
        default = DEFAULT_POSITIONS if self.what == "decode" else DEFAULT_LENGTHS
        return tuple(sorted(set(default if self.lengths is None else self.lengths)))

    @property
    def is_causal(self) -> bool:
        """Whether attention is causal."""
        return self.causal or self.what == "decode"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of q, k and v."""
        return DTYPES[self.dtype]

    @property
    def torch_device(self) -> torch.device:
        """The device; raises OptionError where there is none of that kind."""
        name = self.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            device = torch.device(name)
        except RuntimeError as error:
            raise OptionError(f"wanted a device of auto, cpu or cuda, got {name!r}") from error
        if device.type not in ("cpu", "cuda"):
            raise OptionError(f"wanted a device of auto, cpu or cuda, got {name!r}, for which nothing is measured yet")
        if device.type == "cuda" and not torch.cuda.is_available():
            raise OptionError(
                f"wanted to measure on {name}, but torch {torch.__version__} sees no CUDA device; pass --device cpu"
            )
        return device

    @property
    def specs(self) -> tuple[Spec, ...]:
        """The mechanisms to measure."""
        if self.mechanisms is not None:
            return parse_specs(self.mechanisms)
        rows = (registry.row(name) for name in registry.names() if name != "softmax")
        return tuple(default_spec(row.name) for row in rows if row.causal or not self.is_causal)

    @property
    def peer_sizes(self) -> PeerSizes:
        """What peers are built for."""
        return PeerSizes(self.num_heads, self.head_dim, self.points[-1], self.peer_features, self.is_causal)

    def built(self) -> tuple[dict[str, registry.Mechanism], dict[str, str]]:
        """The mechanisms by the text of their spec, and for those that cannot be built here the reason.

        Raises:
            OptionError: one that was asked for by name cannot be built.
        """
        found: dict[str, registry.Mechanism] = {}
        reasons: dict[str, str] = {}
        for spec in self.specs:
            row = registry.row(spec.name)
            try:
                mech = spec.build(self.head_dim, self.num_heads, seed=self.seed)
            except MaclinError as error:
                if self.mechanisms is not None:
                    raise
                reasons[spec.text] = str(error)
                continue
            if self.is_causal and not row.causal:
                reasons[spec.text] = f"{row.name} has no causal form"
            elif not self.is_causal and not mech.bidirectional:
                reasons[spec.text] = f"{spec.text} works along time; pass --causal"
            else:
                found[spec.text] = mech.to(device=self.torch_device, dtype=self.torch_dtype)
        return found, reasons

    def settings(self) -> Config:
        """What a result says of this job."""
        named = {name: value for name, value in dataclasses.asdict(self).items() if name != "what"}
        return {
            **named,
            "mechanisms": [spec.text for spec in self.specs],
            "lengths": list(self.points),
            "only_peers": list(self.only_peers),
            "device": str(self.torch_device),
            "causal": self.is_causal,
        }
