"""Reading collectives out of program texts: small samples of each compiler, and real programs."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from soup_jax.planning import hlo

HEADER = "HloModule jit_step, is_scheduled=true, num_partitions=8\n\n"


def program(*lines, computations=""):
    return (
        HEADER + computations + "ENTRY %main (p: f32[8]) -> f32[8] {\n" + "\n".join(lines) + "\n}\n"
    )


def only(*lines, **options):
    (found,) = hlo.collectives(program(*lines, **options))
    return found


@pytest.mark.parametrize(
    ("line", "kind", "payload", "group_size", "moved"),
    [
        (
            "%a = bf16[16,128]{1,0:T(8,128)(2,1)S(1)} all-gather(%x), replica_groups=[2,4]<=[8]",
            "all-gather",
            4096,
            4,
            3072,
        ),
        (
            "%a = (f32[16]{0:T(128)}, /*index=1*/f32[]{:T(128)}) all-reduce(%x, %y), "
            "replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add",
            "all-reduce",
            68,
            2,
            68,
        ),
        (
            "ROOT %a = f32[4,2]{1,0} reduce-scatter(%x), replica_groups=[1,8]<=[8], dimensions={0}",
            "reduce-scatter",
            256,
            8,
            224,
        ),
        (
            "%a = (bf16[64]{0}, bf16[512]{0}) all-gather-start(%x), replica_groups={}",
            "all-gather",
            1024,
            8,
            896,
        ),
        (
            "%a = ((f32[4]{0}, f32[4]{0}), (f32[2]{0}, f32[6]{0}), u32[]) "
            "all-to-all-start(%x, %y), replica_groups={{0,1,2,3},{4,5,6,7}}",
            "all-to-all",
            32,
            4,
            24,
        ),
        (
            "%a = f32[100]{0} all-reduce-start(%x), replica_groups=[8,1]<=[2,4]T(1,0), to_apply=%f",
            "all-reduce",
            400,
            1,
            0,
        ),
        (
            "%a = (f32[16,8]{0,1}, f32[16,8]{0,1}, u32[]{:S(2)}, u32[]{:S(2)}) "
            "collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}",
            "collective-permute",
            512,
            8,
            512,
        ),
        (
            "%a = s4[32]{0} ragged-all-to-all(%x, %y, %i, %s, %o, %r), "
            "replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}",
            "ragged-all-to-all",
            16,
            4,
            12,
        ),
        (
            "%a = f8e4m3fn[32]{0} all-gather(%x), replica_groups=mesh['a'=2,'b'=4] {'a','b':(1)2}",
            "all-gather",
            32,
            4,
            24,
        ),
    ],
)
def test_one_line(line, kind, payload, group_size, moved):
    found = only("  " + line)
    assert (found.kind, found.payload_bytes, found.group_size) == (kind, payload, group_size)
    assert found.moved_bytes == moved
    assert (found.times, found.in_loop) == (1, False)


@pytest.mark.parametrize(
    ("shape", "said", "kind", "group_size", "crossing"),
    [
        (
            "bf16[16,8,128]{2,1,0:T(8,128)(2,1)}",
            "_xla_megascale_target={{100000,100001,200000,200001}},"
            '_xla_megascale_transfer_type="ALL_TO_ALL"',
            "all-to-all",
            4,
            16384,
        ),
        (
            "f32[1,2,128]{2,1,0:T(2,128)}",
            '_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1,2}x{0:7}",'
            '_xla_megascale_transfer_type="ALL_REDUCE"',
            "all-reduce",
            2,
            1024,
        ),
        (
            "f32[24,16]{1,0:T(8,128)}",
            '_xla_megascale_target="{1,2,3,4}x{0:3}",_xla_megascale_transfer_type="ALL_GATHER"',
            "all-gather",
            4,
            3 * 1536,
        ),
        (
            "f32[24,16]{1,0:T(8,128)}",
            "_xla_megascale_target={{100001->200000},{100002->300000}},"
            '_xla_megascale_transfer_type="ONE_TO_ONE"',
            "collective-permute",
            2,
            1536,
        ),
    ],
)
def test_what_a_slice_sends_to_another(shape, said, kind, group_size, crossing):
    handler = '_xla_host_transfer_handler_name="xla_megascale_runtime"'
    found = only(
        f"  %s = ({shape}, u32[], token[]) send(%x, %after), channel_id=6, is_host_transfer=true, "
        f"frontend_attributes={{{handler},{said}}}"
    )
    assert (found.kind, found.group_size) == (kind, group_size)
    assert found.num_slices == (2 if kind == "all-to-all" else group_size)
    assert found.crossing_bytes == crossing


def test_a_transfer_to_unknown_devices_is_no_guess():
    with pytest.raises(RuntimeError, match="between slices in an unknown way"):
        only(
            "  %s = (f32[8]{0}, u32[], token[]) send(%x, %after), channel_id=6, "
            'frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}'
        )


def test_what_looks_like_a_collective_and_is_none():
    assert not hlo.collectives(
        program(
            "  %d = f32[16]{0} all-reduce-done(%a)",
            '  %f = f32[16]{0} fusion(%all-gather.1), kind=kLoop, metadata={op_name="all-gather("}',
            "  %p = u32[] partition-id()",
        )
    )


def test_an_asynchronous_collective_in_several_fusions_counts_once():
    computations = "".join(
        f"%fused.{i} (p: f32[1]) -> f32[8] {{\n"
        f"  ROOT %all-gather.{i} = f32[8]{{0}} all-gather(%p), channel_id=7, "
        "replica_groups=[1,8]<=[8]\n}\n\n"
        for i in range(3)
    )
    calls = [f"  %f.{i} = f32[8]{{0}} fusion(%x), kind=kCustom, calls=%fused.{i}" for i in range(3)]
    assert only(*calls, computations=computations).payload_bytes == 32


def test_collectives_of_one_channel_in_one_computation_count_each():
    lines = [
        f"  %r.{i} = f32[8]{{0}} reduce-scatter(%x.{i}), channel_id=1, "
        "replica_groups=[1,8]<=[8], dimensions={0}, to_apply=%add"
        for i in range(3)
    ]
    assert len(hlo.collectives(program(*lines))) == 3


LOOP = """%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %r = f32[8]{0} all-reduce(%x), channel_id=1, replica_groups=[1,8]<=[8], to_apply=%add
}

%condition (p: (s32[], f32[8])) -> pred[] {
  %bound = s32[]{:T(128)} constant(12)
  %p = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, BOUND), direction=LT
}

"""
WHILE = "  %w = (s32[], f32[8]{0}) while(%t), condition=%condition, body=%body"


@pytest.mark.parametrize(
    ("bound", "backend", "times", "known"),
    [
        ("%bound", "", 12, True),
        ("%unknown", "", 1, False),
        ("%unknown", ', backend_config={"known_trip_count":{"n":"5"}}', 5, True),
    ],
)
def test_loops(bound, backend, times, known):
    found = only(WHILE + backend, computations=LOOP.replace("BOUND", bound))
    assert (found.times, found.in_loop, found.known_times) == (times, True, known)
    assert found.moved_bytes == times * 2 * 7 / 8 * 32


def test_an_asynchronous_collective_takes_place_as_often_as_it_starts():
    """Not once for each turn of a loop that it overlaps with."""
    gather = "all-gather(%p), channel_id=7, replica_groups=[1,8]<=[8]"
    fusion = "  %f = f32[8]{0} fusion(%x), kind=kCustom, calls="
    loop = LOOP.replace("BOUND", "%bound").replace("  %r = ", f"{fusion}%overlapped\n  %r = ")
    computations = (
        f"%overlapped (p: f32[1]) -> f32[8] {{\n  ROOT %g.1 = f32[8]{{0}} {gather}\n}}\n\n"
        f"%start (p: f32[1]) -> f32[8] {{\n  %g.2 = f32[8]{{0}} {gather}\n"
        '  ROOT %c = f32[8]{0} custom-call(%g.2), custom_call_target="AsyncCollectiveStart"\n}\n\n'
    )
    found = hlo.collectives(program(f"{fusion}%start", WHILE, computations=loop + computations))
    assert [c.times for c in found if c.kind == "all-gather"] == [1]


def test_nested_loops_multiply_and_unused_computations_do_not_count():
    inner = LOOP.replace("BOUND", "%bound")
    outer = inner.replace("%body", "%outer").replace("%condition", "%until")
    outer = outer.replace("  %r = ", WHILE + "\n  %r = ").replace("channel_id=1", "channel_id=2")
    loop = WHILE.replace("%body", "%outer").replace("%condition", "%until")
    found = hlo.collectives(program(loop, computations=inner + outer))
    assert sorted(c.times for c in found) == [12, 144]
    assert not hlo.collectives(program("  %c = f32[] constant(1)", computations=inner))


def test_totals():
    gather = "  %a = f32[8]{0} all-gather(%x), replica_groups=[1,8]<=[8]"
    found = hlo.collectives(program(gather, gather.replace("%a", "%b")))
    assert hlo.total_bytes(found) == {"all-gather": 56}
    assert hlo.num_scalars("(f32[8,2]{1,0}, s32[])") == 17


def compiled(function, spec, shape=(64, 16)):
    mesh = Mesh(jax.devices(), ("x",))
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
    everywhere = NamedSharding(mesh, P())
    return jax.jit(function, out_shardings=everywhere).lower(x).compile().as_text()


def test_a_real_gather_and_a_real_sum():
    (gather,) = hlo.collectives(compiled(lambda x: x * 2, P("x")))
    assert (gather.kind, gather.payload_bytes, gather.group_size) == ("all-gather", 4096, 8)
    (total,) = hlo.collectives(compiled(lambda x: x.sum(0), P("x")))
    assert (total.kind, total.shapes, total.group_size) == ("all-reduce", ("f32[16]",), 8)
    assert "reduce_sum" in total.op_name


def test_a_real_loop_counts_its_trips():
    def scanned(x):
        def add(carry, w):
            return jnp.tanh(carry @ w).sum(0, keepdims=True) * jnp.ones((64, 1)), None

        return jax.lax.scan(add, x, jnp.ones((5, 16, 16)))[0]

    looped = [c for c in hlo.collectives(compiled(scanned, P("x"))) if c.in_loop]
    assert looped
    assert {c.times for c in looped} == {5}
    assert all(c.known_times for c in looped)


def test_one_device_moves_nothing():
    text = jax.jit(lambda x: x.sum()).lower(jnp.ones(4)).compile().as_text()
    assert hlo.collectives(text) == []
