"""What TrAct does to a layer, and whether its lam and its inputs suit each other.

`TrAct.report()` makes these reports from what TrAct has anyway: the factor of G + lam I, where
G = x x^T / b, the treated gradient, and the mean and the variance of one forward's inputs.
"""

# N inputs a row, O outputs, C channels

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tract_transfer.tract.gram import DampedFactor
from tract_transfer.tract.lags import sum_dtype
from tract_transfer.tract.watch import WatchedLayer

# The paper's figure 6: with each lam from 0.00625 to 1.6, a ViT on inputs of mean square 1 learned
# better than with the plain gradient. The paper's default is 0.1.
LEAST_LAM, MOST_LAM, DEFAULT_LAM = 0.00625, 1.6, 0.1
WHITE = 2.0  # condition number of G + lam I up to which TrAct turns no gradient by 20 degrees
DOMINANT = 0.5  # share of the mean in G from which it outweighs all that varies
CONSTANT = 1e-3  # std / rms: rounding to 8 bits alone makes 1 / (255 sqrt(12)) = 0.0011
MAX_CHANNELS = 8  # that a report prints
NO_EFFECT = ("frozen", "computed", "blank", "large_lam", "white")
UNSAFE = ("not_finite", "rounding")
_SCALE = ("large_lam", "lam_above_range", "lam_below_range", "rounding", "mean_dominates")


@dataclass(frozen=True)
class ChannelInputs:
    """The inputs of one channel; those of a Linear are one channel.

    `rms` is the root of the mean square in G, which includes padding. `mean` and `std` are over the
    pixels of one forward, without padding; None if it was not measured.
    """

    rms: float
    mean: float | None
    std: float | None


@dataclass(frozen=True, eq=False)
class LayerReport:
    """How TrAct treats a layer. Figures that are not known are None.

    Attributes:
        kernel: (height, width) of a convolution.
        num_inputs: N; G is N x N.
        damping: lam in units of a squared input, as it is added to G.
        eigenvalues: (N,) of G, float64, the largest first. Those below the rounding error are 0.
        mean_share: the share of the trace of G that the mean of the inputs makes.
        gradient_ratio: length of TrAct's gradient / length of the plain one.
        gradient_angle_deg: angle between the two.
        findings: what is wrong, in plain English with the fix, by kind. The kinds and when they
            hold, with e the eigenvalues of G and e_mean their mean, the mean square of the inputs:

            frozen, computed: the weight takes no gradient, or is computed from other parameters.
            not_finite: G is not finite.
            blank: G is 0.
            rounding: lam < 4 eps tr(G), the error that rounding can make in an eigenvalue.
            large_lam: lam >= each e. The factors 1 / (e + lam) then differ by less than 2.
            white: all e + lam lie within a factor of 2, and lam is not the reason. A matrix of
                condition number k turns a vector by at most arccos(2 sqrt(k) / (1 + k))
                (Kantorovich), which is 19.5 degrees for k = 2.
            lam_below_range, lam_above_range: lam / e_mean is outside [0.00625, 1.6], where the
                paper's figure 6 has results.
            mean_dominates: the mean makes half of tr(G) or more, so mean^2 >= variance.
            constant_channel: std <= rms / 1000, less than rounding to 8 bits makes.
    """

    name: str
    kind: str
    kernel: tuple[int, int] | None
    num_inputs: int
    lam: float
    lam_mode: str
    damping: float | None
    eigenvalues: Tensor | None
    channels: tuple[ChannelInputs, ...]
    mean_share: float | None
    gradient_ratio: float | None
    gradient_angle_deg: float | None
    findings: Mapping[str, str]

    @property
    def largest(self) -> float | None:
        """The largest eigenvalue of G."""
        return None if self.eigenvalues is None else float(self.eigenvalues[0])

    @property
    def smallest(self) -> float | None:
        """The smallest eigenvalue of G."""
        return None if self.eigenvalues is None else float(self.eigenvalues[-1])

    @property
    def median(self) -> float | None:
        """The median eigenvalue of G."""
        return None if self.eigenvalues is None else float(self.eigenvalues.median())

    @property
    def mean_square(self) -> float | None:
        """The mean eigenvalue of G, which is the mean square of the inputs."""
        return None if self.eigenvalues is None else float(self.eigenvalues.mean())

    @property
    def effective_rank(self) -> float | None:
        """exp(entropy) of the eigenvalues divided by their sum (Roy and Vetterli, 2007)."""
        if self.eigenvalues is None or not self.mean_square:
            return None
        return float(torch.special.entr(self.eigenvalues / self.eigenvalues.sum()).sum().exp())

    @property
    def condition(self) -> float | None:
        """Largest / smallest eigenvalue of G; infinite if G is singular up to rounding."""
        return self._condition(0.0)

    @property
    def damped_condition(self) -> float | None:
        """Largest / smallest eigenvalue of G + lam I."""
        return None if self.damping is None else self._condition(self.damping)

    @property
    def relative_lam(self) -> float | None:
        """Lam / mean eigenvalue of G."""
        return (
            self.damping / self.mean_square
            if self.damping is not None and self.mean_square
            else None
        )

    @property
    def most_angle_deg(self) -> float | None:
        """The largest angle by which TrAct can turn a gradient of this layer."""
        return _most_angle_deg(self.damped_condition) if self.damped_condition else None

    @property
    def has_effect(self) -> bool:
        """Whether TrAct changes the direction of the gradient."""
        return not any(kind in NO_EFFECT for kind in self.findings)

    @property
    def is_safe(self) -> bool:
        """Whether the update is not that of rounding errors."""
        return not any(kind in UNSAFE for kind in self.findings)

    @property
    def verdict(self) -> str:
        """The findings; if there are none, what TrAct does."""
        if self.findings:
            return " ".join(self.findings.values())
        if self.eigenvalues is None or self.damping is None:
            return "Nothing is known of the inputs."
        above = int((self.eigenvalues > self.damping).sum())
        return (
            f"TrAct works as intended: lam is {_figure(self.relative_lam)} of the mean square of "
            f"the inputs, and {above} of the {self.num_inputs} eigenvalues of G exceed it."
        )

    @property
    def recommended(self) -> dict[str, Any]:
        """The `lam` and `lam_mode` to use: the present ones unless their scale is wrong."""
        if any(kind in self.findings for kind in _SCALE):
            return {"lam": DEFAULT_LAM, "lam_mode": "relative"}
        return {"lam": self.lam, "lam_mode": self.lam_mode}

    def as_dict(self) -> dict[str, Any]:
        """Return all figures as plain types for JSON; infinite ones are None."""
        names = (
            "name", "kind", "kernel", "num_inputs", "lam", "lam_mode", "damping", "relative_lam",
            "largest", "median", "smallest", "mean_square", "effective_rank", "condition",
            "damped_condition", "mean_share", "gradient_ratio", "gradient_angle_deg",
            "most_angle_deg", "has_effect", "is_safe", "verdict", "recommended",
        )  # fmt: skip
        values = {name: getattr(self, name) for name in names}
        finite = {k: None if v in (math.inf, -math.inf) else v for k, v in values.items()}
        channels = [asdict(channel) for channel in self.channels]
        return {**finite, "channels": channels, "findings": dict(self.findings)}

    def __str__(self) -> str:
        kernel = f", kernel {self.kernel[0]} x {self.kernel[1]}" if self.kernel else ""
        lines = [f"TrAct on {self.name or 'the layer'} ({self.kind}{kernel})"]
        for title, text in self._rows():
            lines += [f"  {title if i == 0 else '':<12} {line}" for i, line in enumerate(text)]
        return "\n".join([*lines, f"  {'verdict':<12} {self.verdict}"])

    def _rows(self) -> list[tuple[str, list[str]]]:
        """Titles and lines of `str`."""
        rows = [("G", [f"{self.num_inputs} x {self.num_inputs}"])]
        lam = f"{self.lam:g} ({self.lam_mode})"
        if self.eigenvalues is not None:
            figure = _figure
            rows += [
                ("eigenvalues", [
                    f"largest {figure(self.largest)}, median {figure(self.median)}, smallest "
                    f"{figure(self.smallest)}, mean {figure(self.mean_square)}; effective rank "
                    f"{figure(self.effective_rank)}"
                ]),
                ("condition", [
                    f"{figure(self.condition)} of G, {figure(self.damped_condition)} of G + lam I"
                ]),
            ]  # fmt: skip
            if "rounding" in self.findings:
                lam += f", raised to {figure(self.damping)}"
            lam += f", {figure(self.relative_lam)} x the mean eigenvalue"
        rows.append(("lam", [lam]))
        if self.channels:
            lines = [
                f"channel {index}: mean {_figure(channel.mean)}, std {_figure(channel.std)}, "
                f"rms {_figure(channel.rms)}"
                for index, channel in enumerate(self.channels[:MAX_CHANNELS])
            ]
            more = len(self.channels) - MAX_CHANNELS
            rows.append(("inputs", [*lines, *([f"and {more} more channels"] if more > 0 else [])]))
        if self.gradient_ratio is not None:
            rows.append(("gradient", [
                f"TrAct's is {_figure(self.gradient_ratio)} times as long as the plain one, at an "
                f"angle of {self.gradient_angle_deg:.0f} degrees (at most "
                f"{self.most_angle_deg or 0:.0f})"
            ]))  # fmt: skip
        return rows

    def _condition(self, added: float) -> float | None:
        if self.largest is None or self.smallest is None:
            return None
        below = self.smallest + added
        return (self.largest + added) / below if below else math.inf


class Report(dict[str, LayerReport]):
    """Reports of the treated layers by name; `print` it."""

    @property
    def has_effect(self) -> bool:
        """Whether TrAct changes the direction of a layer's gradient."""
        return any(layer.has_effect for layer in self.values())

    @property
    def is_safe(self) -> bool:
        """Whether no layer's update is that of rounding errors."""
        return all(layer.is_safe for layer in self.values())

    def __str__(self) -> str:
        return "\n\n".join(map(str, self.values())) or "TrAct treats no layer."


def describe_layer(
    watched: WatchedLayer,
    lam: float,
    lam_mode: str,
    factor: DampedFactor | None,
    gradients: tuple[Tensor, Tensor] | None,
) -> LayerReport:
    """Return the report of a layer.

    Args:
        factor: of G + lam I; None if no forward is known.
        gradients: the plain and the treated gradient, (O, ...).
    """
    layer = watched.layer
    convolution = layer if isinstance(layer, nn.Conv2d) else None
    gram = damping = eigenvalues = None
    if factor is not None and bool(factor.health[:2].all()):
        # Of the rounding error that damped_factor assumes.
        gram, damping = factor.gram(), float(factor.damping)
        error = 4 * torch.finfo(sum_dtype(layer.weight.dtype)).eps * float(gram.trace())
        eigenvalues = torch.linalg.eigvalsh(gram).flip(0)
        eigenvalues = torch.where(eigenvalues > error, eigenvalues, 0)
    channels, mean_share = _describe_inputs(watched, gram)
    ratio, angle = (None, None) if gradients is None else compare(*gradients)
    report = LayerReport(
        name=watched.name,
        kind=type(layer).__name__,
        kernel=None if convolution is None else (layer.weight.shape[2], layer.weight.shape[3]),
        num_inputs=layer.weight.shape[1:].numel(),
        lam=lam,
        lam_mode=lam_mode,
        damping=damping,
        eigenvalues=eigenvalues,
        channels=channels,
        mean_share=mean_share,
        gradient_ratio=ratio,
        gradient_angle_deg=angle,
        findings={},
    )
    return replace(report, findings=_find(report, watched, factor))


def compare(plain: Tensor, treated: Tensor) -> tuple[float | None, float | None]:
    """Return length of treated / length of plain, and their angle in degrees; None for zeros."""
    plain, treated = (g.detach().double().cpu().flatten() for g in (plain, treated))
    lengths = float(plain.norm()), float(treated.norm())
    if not all(0 < length < math.inf for length in lengths):
        return None, None
    # Exact for small angles too, unlike the arc cosine of a product close to 1.
    first, second = plain / lengths[0], treated / lengths[1]
    angle = 2 * math.atan2(float((first - second).norm()), float((first + second).norm()))
    return lengths[1] / lengths[0], math.degrees(angle)


def _most_angle_deg(condition: float) -> float:
    """Return by how much a positive matrix turns a vector at most: Kantorovich's inequality."""
    return math.degrees(math.acos(min(1.0, 2 * math.sqrt(condition) / (1 + condition))))


def _describe_inputs(
    watched: WatchedLayer, gram: Tensor | None
) -> tuple[tuple[ChannelInputs, ...], float | None]:
    """Return the inputs by channel, and the share that their mean has in their mean square."""
    if gram is None:
        return (), None
    weight, is_linear = watched.layer.weight, isinstance(watched.layer, nn.Linear)
    squares = gram.diagonal().view(1 if is_linear else weight.shape[1], -1).mean(1)
    roots = squares.clamp_min(0).sqrt().tolist()
    moments = watched.input_moments
    # Those of a forward that was forgotten may be NaN.
    if moments is None or not all(moment.isfinite().all() for moment in moments):
        return tuple(ChannelInputs(rms, None, None) for rms in roots), None
    # A value for each channel, or for each input of a Linear.
    variances, means = (moment.double().cpu() for moment in moments)
    total = float((variances + means.square()).sum())
    share = float(means.square().sum()) / total if total > 0 else None
    if is_linear:
        variance = variances.mean() + means.var(correction=0)
        variances, means = variance.view(1), means.mean().view(1)
    deviations = variances.clamp_min(0).sqrt().tolist()
    rows = zip(roots, means.tolist(), deviations, strict=True)
    return tuple(ChannelInputs(*row) for row in rows), share


def _find(
    report: LayerReport, watched: WatchedLayer, factor: DampedFactor | None
) -> dict[str, str]:
    """Return the findings of a report by kind."""
    weight, title = watched.layer.weight, watched.title
    if not isinstance(weight, nn.Parameter):
        return {"computed": (
            f"{title}.weight is computed from others (weight_norm, a parametrization), so TrAct "
            "has no effect. Give it a plain first layer."
        )}  # fmt: skip
    if not weight.requires_grad:
        return {"frozen": (
            f"{title} is frozen, so TrAct has no effect. Unfreeze the layer, or leave TrAct out."
        )}  # fmt: skip
    check = "Check the images and their normalization."
    is_finite, is_positive, has_lam = factor.health.tolist() if factor else (True, True, True)
    if not is_finite:
        return {"not_finite": (
            "The inputs are not finite (NaN, infinity, or too large to square), or there were "
            f"none. {check}"
        )}  # fmt: skip
    if report.mean_square == 0:
        return {"blank": f"Every input is 0, so there is no gradient to treat. {check}"}
    if is_positive and has_lam:
        found = _find_scale(report)
    else:
        found = {"rounding": (
            f"lam = {report.lam:g} is below the rounding error of G, so TrAct amplifies rounding "
            f"errors. {_rescale(report, 'or')}"
        )}  # fmt: skip
    if report.mean_share is not None and report.mean_share >= DOMINANT:
        found["mean_dominates"] = (
            f"The inputs are not normalized: their mean makes {report.mean_share:.0%} of G. "
            f"{_rescale(report, 'or at least')}"
        )
    constant = [
        index
        for index, channel in enumerate(report.channels)
        if report.kernel and channel.mean is not None and channel.std is not None
        and channel.std <= CONSTANT * math.hypot(channel.mean, channel.std)
    ]  # fmt: skip
    if constant:
        which = ", ".join(map(str, constant[:MAX_CHANNELS]))
        found["constant_channel"] = (
            f"Input channel {which} is constant, so its weights learn no more than a bias. Check "
            "how the images are loaded (an alpha channel, a missing band)."
        )
    return found


def _find_scale(report: LayerReport) -> dict[str, str]:
    """Return what the eigenvalues of G and lam show."""
    condition, lam = report.damped_condition, report.relative_lam
    if condition is None or lam is None or report.damping is None or report.largest is None:
        return {}
    at_most = f"by {_most_angle_deg(condition):.0f} degrees at most"
    if report.damping >= report.largest:
        return {"large_lam": (
            f"lam is larger than every eigenvalue of G, so TrAct only rescales the gradient: it "
            f"turns it {at_most}. {_rescale(report, 'or')}"
        )}  # fmt: skip
    if condition <= WHITE:
        angle = report.gradient_angle_deg
        turns = "" if angle is None else f" (by {angle:.0f} degrees, {at_most})"
        return {"white": (
            "The inputs are white already: TrAct changes the gradient's length but hardly its "
            f"direction{turns}. A learning rate does the same."
        )}  # fmt: skip
    outside = f"{_figure(lam)} of the mean square of the inputs, and the paper's results are for "
    outside += f"{LEAST_LAM} to {MOST_LAM}."
    if lam > MOST_LAM:
        text = f"lam is {outside} TrAct mostly rescales the gradient. {_rescale(report, 'or')}"
        return {"lam_above_range": text}
    if lam < LEAST_LAM:
        text = (
            f"lam is {outside} TrAct amplifies noise in weak directions. {_rescale(report, 'or')}"
        )
        return {"lam_below_range": text}
    return {}


def _rescale(report: LayerReport, joined_by: str) -> str:
    """Return how to make lam and the inputs suit each other."""
    fix = "Normalize the inputs to mean 0 and standard deviation 1"
    if report.lam_mode == "relative":
        is_default = report.lam == DEFAULT_LAM
        return f"{fix}." if is_default else f"{fix}, {joined_by} set lam to {DEFAULT_LAM}."
    return f"{fix}, {joined_by} use lam_mode='relative' with lam={DEFAULT_LAM}."


def _figure(value: float | None) -> str:
    """Return three digits of a figure."""
    if value is None:
        return "unknown"
    return f"{value:.3g}" if math.isfinite(value) else "infinite"
