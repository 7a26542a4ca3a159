"""What a compiled program moves between devices, read from its text.

`jax.stages.Compiled.as_text()` is the program of one device after partitioning and optimisation.
This module looks at text only, so programs for chips that are not present are as good as others.

Bytes are counted per device and step. `payload_bytes` is the larger of what a device puts in and
what it gets out; `moved_bytes` what it sends if the operation runs as a ring: (g - 1) / g of the
payload among g devices, twice that for an all-reduce, all of it for a permutation.

A program for several TPU slices hands what crosses them to its hosts: a collective over slices is a
send and a receive to a runtime there ("megascale"), which says the kind and the devices.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)

_SHAPE = re.compile(r"\b(pred|bf16|[suf]\d+\w*|c64|c128)\[([\d,<=]*)\]")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
    r"|\b(?:branch_computations|called_computations|calls)=\{([^}]*)\}"
)
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a program.

    Attributes:
      kind: one of KINDS, without "-start".
      shapes: what a device gets out, as in "bf16[16,128]".
      payload_bytes: of what it gets out, or of what it puts in if that is more; once.
      group_size: devices that exchange with each other.
      num_slices: slices, joined by the data-centre network, among which these are.
      times: how often a step runs it: the product of the trip counts of the loops around it.
      in_loop: whether it stands inside a loop.
      known_times: False if a loop around it has a trip count that the text does not tell; `times`
        then leaves that loop out.
      op_name: the jax operation it came from, or "".
    """

    kind: str
    shapes: tuple[str, ...]
    payload_bytes: int
    group_size: int
    num_slices: int = 1
    times: int = 1
    in_loop: bool = False
    known_times: bool = True
    op_name: str = ""

    @property
    def moved_bytes(self) -> float:
        """Bytes that a device sends in one step."""
        others = (self.group_size - 1) / max(self.group_size, 1)
        share = {"all-reduce": 2 * others, "collective-permute": 1.0}.get(self.kind, others)
        return self.times * self.payload_bytes * share

    @property
    def crossing_bytes(self) -> float:
        """Bytes of these that go to another slice."""
        if self.num_slices == 1:
            return 0.0
        if self.kind == "all-to-all":  # to all devices alike
            return self.times * self.payload_bytes * (1 - 1 / self.num_slices)
        return self.moved_bytes


@dataclasses.dataclass(frozen=True)
class _Instruction:
    type: str
    opcode: str
    rest: str  # from the opening parenthesis of the operands on


_Computations = dict[str, dict[str, _Instruction]]


def collectives(text: str) -> list[Collective]:
    """All collectives of a program, in the order of its text; each asynchronous one once."""
    computations, entry = _parse(text)
    num_devices = _num_devices(text)
    calls = _executions(computations, entry)
    found: dict[object, Collective] = {}
    started: set[object] = set()
    for name, instructions in computations.items():
        if name not in calls:
            continue
        channels: collections.Counter[object] = collections.Counter()
        starts = any("AsyncCollectiveStart" in i.rest for i in instructions.values())
        for number, instruction in enumerate(instructions.values()):
            collective = _collective(instruction, num_devices)
            if collective is None:
                continue
            times, in_loop, known = calls[name]
            collective = dataclasses.replace(
                collective, times=times, in_loop=in_loop, known_times=known
            )
            # The TPU compiler repeats an asynchronous collective in every fusion that it overlaps
            # with, under one channel, also in those of a loop that it lasts for: the start says how
            # often it takes place. Several in one computation are different ones: all that
            # `shard_map` writes have the same channel.
            key: tuple[object, ...] = (name, number)
            if channel := re.search(r"\bchannel_id=(\d+)", instruction.rest):
                key = (collective.kind, int(channel[1]))
                channels[key] += 1
                key = (*key, channels[key])
            if key not in started and (starts or key not in found or found[key].times < times):
                found[key] = collective
            if starts:
                started.add(key)
    return list(found.values())


def total_bytes(found: Iterable[Collective]) -> dict[str, float]:
    """Bytes that a device sends in one step, by kind; kinds that do not occur are left out."""
    totals: dict[str, float] = collections.defaultdict(float)
    for collective in found:
        totals[collective.kind] += collective.moved_bytes
    return dict(totals)


def shape_bytes(text: str) -> int:
    """Bytes of all array shapes that occur in a type: "(f32[16,128]{1,0}, s4[2])" has 8,193."""
    bits = 0
    for dtype, dims in _SHAPE.findall(text):
        bits += _bits(dtype) * math.prod(int(d.lstrip("<=")) for d in dims.split(",") if d)
    return bits // 8


def num_scalars(text: str) -> int:
    """Scalars of all array shapes that occur in a type."""
    shapes = (dims for _, dims in _SHAPE.findall(text))
    return sum(math.prod(int(d.lstrip("<=")) for d in dims.split(",") if d) for dims in shapes)


def _bits(dtype: str) -> int:
    if dtype == "pred":
        return 8
    return int("".join(re.findall(r"\d+", dtype)[:1]))


def _parse(text: str) -> tuple[_Computations, str]:
    computations: _Computations = {}
    entry = ""
    current: dict[str, _Instruction] | None = None
    for line in text.splitlines():
        if not line.startswith(" "):
            header = _COMPUTATION.match(line)
            current = None
            if header:
                current = computations.setdefault(header[2], {})
                entry = header[2] if header[1] else entry
            continue
        match = _INSTRUCTION.match(line)
        if match and current is not None:
            kind, rest = _split_type(match[2])
            opcode, parenthesis, operands = rest.partition("(")
            current[match[1]] = _Instruction(kind, opcode.strip(), parenthesis + operands)
    return computations, entry


def _split_type(text: str) -> tuple[str, str]:
    # "(f32[2]{0:T(128)}, s32[]) while(...)" -> its type and the rest. Layouts hold parentheses too.
    if not text.startswith("("):
        kind, _, rest = text.partition(" ")
        return kind, rest
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return text[: i + 1], text[i + 1 :].lstrip()
    return text, ""


def _elements(kind: str) -> list[str]:
    # Top-level elements of a tuple type; the type itself if it is none.
    if not kind.startswith("("):
        return [kind]
    parts, depth, start = [], 0, 1
    for i, character in enumerate(kind):
        depth += (character in "([{") - (character in ")]}")
        if depth == 1 and character == ",":
            parts.append(kind[start:i])
            start = i + 1
    return [*parts, kind[start:-1]]


def _collective(instruction: _Instruction, num_devices: int) -> Collective | None:
    if instruction.opcode == "send":
        return _over_slices(instruction)
    kind = instruction.opcode.removesuffix("-start")
    if kind not in KINDS:
        return None
    started = instruction.opcode.endswith("-start") and kind != "all-reduce"
    elements = _elements(instruction.type)
    # The start of an asynchronous operation gives (what goes in, what comes out, counters...).
    output = elements[1] if started and len(elements) > 1 else instruction.type
    size = shape_bytes(output)
    group_size = _group_size(instruction.rest, num_devices)
    if kind == "reduce-scatter":
        size *= group_size
    return Collective(
        kind=kind,
        shapes=_shapes(output),
        payload_bytes=size,
        group_size=group_size,
        op_name=_op_name(instruction),
    )


def _shapes(kind: str) -> tuple[str, ...]:
    return tuple(f"{dtype}[{dims}]" for dtype, dims in _SHAPE.findall(kind))


def _op_name(instruction: _Instruction) -> str:
    name = re.search(r'op_name="((?:[^"\\]|\\.)*)"', instruction.rest)
    return name[1] if name else ""


def _over_slices(instruction: _Instruction) -> Collective | None:
    # Devices are written as a product, {1,2}x{0:7}: each with those of its place in other slices;
    # as groups, {{100000,100001,200000,200001}}: slice and place in one number; or as pairs.
    attributes = instruction.rest
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', attributes)
    if not kind:
        return None
    product = re.search(r'_xla_megascale_target="\{([\d,]+)\}x', attributes)
    listed = re.search(r"_xla_megascale_target=\{\{([\d,]+)(->\d+)?\}", attributes)
    if product:
        slices = group = len(product[1].split(","))
    elif listed and listed[2]:
        slices = group = 2
    elif listed:
        devices = [int(d) for d in listed[1].split(",")]
        slices, group = len({d // 100_000 for d in devices}), len(devices)
    else:
        raise RuntimeError(
            "this compiler writes a transfer between slices in an unknown way, so plan without "
            f"--slices: {attributes[:300]}"
        )
    sent = _elements(instruction.type)[0]
    name = kind[1].lower().replace("_", "-")
    return Collective(
        kind="collective-permute" if name == "one-to-one" else name,
        shapes=_shapes(sent),
        payload_bytes=shape_bytes(sent) * (group if name == "all-gather" else 1),
        group_size=group,
        num_slices=slices,
        op_name=_op_name(instruction),
    )


def _group_size(attributes: str, num_devices: int) -> int:
    if "source_target_pairs=" in attributes:
        return num_devices
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\][^{}]*\{([^}]*)\}", attributes)
    if mesh:
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        # A part of an axis is written 'axis':(before)size.
        parts = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part) if part else sizes[name] for name, part in parts)
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=", attributes)
    if iota:
        return int(iota[2])
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
    return len(listed[1].split(",")) if listed else num_devices


def _num_devices(text: str) -> int:
    header = text.partition("\n")[0]
    counts = re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", header)
    return math.prod(int(c) for c in counts)


def _called(instruction: _Instruction) -> Iterator[str]:
    for single, several in _CALLED.findall(instruction.rest):
        yield from [single] if single else (n.strip(" %") for n in several.split(","))


def _executions(computations: _Computations, entry: str) -> dict[str, tuple[int, bool, bool]]:
    # Computation -> (runs per step, inside a loop, all trip counts known). A computation called
    # from several places keeps the call that runs it most often.
    runs: dict[str, tuple[int, bool, bool]] = {}
    pending = [(entry, (1, False, True))]
    while pending:
        name, run = pending.pop()
        if name not in computations or runs.get(name, (0,))[0] >= run[0]:
            continue
        runs[name] = run
        for instruction in computations[name].values():
            inside = run
            if instruction.opcode == "while":
                trips = _trip_count(instruction, computations)
                inside = (run[0] * (trips or 1), True, run[2] and trips is not None)
            pending.extend((called, inside) for called in _called(instruction))
    return runs


def _trip_count(loop: _Instruction, computations: _Computations) -> int | None:
    known = _TRIP_COUNT.search(loop.rest)
    if known:
        return int(known[1])
    # The TPU compiler does not write the count down: a loop that compares its counter, counted from
    # zero in steps of one as jax makes them, with a constant.
    condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
    instructions = computations.get(condition[1], {}) if condition else {}
    for instruction in instructions.values():
        if instruction.opcode == "compare" and "direction=LT" in instruction.rest:
            operands = re.findall(r"%([\w.\-]+)", instruction.rest.partition(")")[0])
            for operand in operands:
                bound = instructions.get(operand)
                if bound is not None and bound.opcode == "constant":
                    number = re.match(r"\((\d+)\)", bound.rest)
                    return int(number[1]) if number else None
    return None
