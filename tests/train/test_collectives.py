"""Collectives are found in a program's text, counted once a turn, and put on axes and networks."""

import json

import pytest

from tests.train import runs
from train.aot.collectives import groups, read, summarise

TWO_SLICES = [0, 0, 0, 0, 1, 1, 1, 1]
NETWORKS = ("ICI", "DCN")


def program(*entry: str, **computations: str) -> str:
    """The text of a program with these lines in its entry, and other computations by name."""
    parts = ["HloModule jit_step, num_partitions=8", "FileNames", '1 "a.py"', ""]
    for name, lines in computations.items():
        parts += [f"%{name} (p: (s32[], f32[4])) -> (s32[], f32[4]) {{", *_indented(lines), "}"]
    return "\n".join([*parts, "ENTRY %main (p: f32[4]) -> f32[4] {", *_indented(*entry), "}"])


def _indented(*lines: str) -> list[str]:
    return [f"  {part.strip()}" for line in lines for part in line.splitlines() if part.strip()]


def rows(text: str, slices: list[int] = TWO_SLICES) -> list[tuple]:
    """(kind, axes, network, count, bytes, sent) of a program on a mesh of 2 x 4."""
    found = summarise(read(text, slices), (2, 4), slices, NETWORKS)
    return [(r.kind, r.axes, r.network, r.count, r.bytes, r.sent) for r in found]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("{{0,1},{2,3}}, dimensions={0}", ((0, 1), (2, 3))),
        ("{{0,1,2,3}}", ((0, 1, 2, 3),)),
        ("{}, to_apply=%add", None),
        ("[2,4]<=[8], channel_id=3", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("[4,2]<=[2,4]T(1,0)", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("[1,8]<=[8]", (tuple(range(8)),)),
        ("mesh['a'=2,'b'=4] {'b'}", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("mesh[a=2,b=4] {a}, use_global_device_ids=true", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("mesh['a'=2,'b'=2] {'a','b'}", ((0, 1, 2, 3),)),
        ("mesh['a'=1,'b'=4] {'b':(2)2}", ((0, 1), (2, 3))),
        ("mesh['a'=1,'b'=4] {'b':(1)2}", ((0, 2), (1, 3))),
        ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", ((0, 2), (1, 3))),
        ("mesh['a'=4], device_ids=(3,2,1,0) {'a'}", ((3, 2, 1, 0),)),
    ],
)
def test_groups_of_devices_are_read_in_every_form(text, found):
    assert groups(text) == found


def test_an_unknown_form_of_groups_is_no_silent_zero():
    with pytest.raises(ValueError, match="form not known"):
        groups("@somewhere")


def test_axes_and_networks_follow_from_the_members_of_a_group():
    text = program(
        "%a = f32[8,128]{1,0} all-gather(%p), channel_id=1, replica_groups=[2,4]<=[8]",
        "%b = f32[256]{0:T(256)} all-reduce(%a), replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add",
        "%c = (bf16[4,16]{1,0}, f32[]) all-to-all(%a, %b), replica_groups={{0,1,2,3,4,5,6,7}}",
        "%d = f32[32] reduce-scatter(%a), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add",
        "%e = f32[64] all-gather(%p), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}",
    )
    assert rows(text) == [
        ("all-gather", "device", "ICI", 1, 4096, 3072),
        ("all-reduce", "node", "DCN", 1, 1024, 1024),
        ("all-to-all", "node+device", "ICI+DCN", 1, 132, 116),
        ("reduce-scatter", "device", "ICI", 1, 512, 384),  # of what goes in
    ]
    one_slice = [row[2] for row in rows(text, [0] * 8)]
    assert one_slice == ["ICI"] * 4  # the axis may still be `node`


def test_a_permutation_sends_its_array_once():
    text = program(
        "%a = f32[10] collective-permute(%p), channel_id=4, source_target_pairs={{0,1},{1,0}}",
        "%b = f32[10] collective-permute(%p), source_target_pairs={{0,4},{4,0}}, other={{9,9}}",
        "%c = f32[10] collective-permute(%p), source_target_pairs={{0,0},{1,1}}",
    )
    assert rows(text) == [
        ("collective-permute", "device", "ICI", 1, 40, 40),
        ("collective-permute", "node", "DCN", 1, 40, 40),
    ]


def test_an_asynchronous_pair_counts_once():
    text = program(
        "%s = (f32[2,128], f32[8,128]) all-gather-start(%p), replica_groups=[2,4]<=[8]",
        "%d = f32[8,128] all-gather-done(%s)",
        "%r = f32[100] all-reduce-start(%p), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add",
        "%rd = f32[100] all-reduce-done(%r)",
        "%q = (f32[10], f32[10], u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%p),"
        " source_target_pairs={{0,1},{1,2}}",
        "%qd = f32[10] collective-permute-done(%q)",
        "%t = ((f32[64]), f32[16], u32[]) async-start(%p), calls=%wrapped",
        "%td = f32[16] async-done(%t), calls=%wrapped",
        wrapped="ROOT %w = f32[16] reduce-scatter(%p), replica_groups=[2,4]<=[8], to_apply=%add",
    )
    assert rows(text) == [
        ("all-gather", "device", "ICI", 1, 4096, 3072),
        ("all-reduce", "device", "ICI", 1, 400, 600),
        ("collective-permute", "device", "ICI", 1, 40, 40),
        ("reduce-scatter", "device", "ICI", 1, 256, 192),
    ]


GATHER = "%g = f32[100] all-gather(%p), replica_groups=[2,4]<=[8]"


def test_a_loop_counts_once_a_turn_and_loops_in_loops_multiply():
    loop = "%w = (s32[], f32[4]) while(%t), condition=%never, body=%{}, backend_config={{{}}}"
    turns = '"known_trip_count":{{"n":"{}"}}'
    text = program(
        loop.format("outer", turns.format(3)),
        outer=loop.format("inner", turns.format(5)) + "\n" + GATHER,
        inner=GATHER,
    )
    assert rows(text) == [("all-gather", "device", "ICI", 3 * 5 + 3, 18 * 400, 18 * 300)]


def test_turns_are_read_off_a_condition_where_xla_notes_none():
    text = program(
        "%w = (s32[], f32[4]) while(%t), condition=%below, body=%body",
        below="""%nine = s32[]{:T(128)} constant(9)
        %counter = s32[]{:T(128)} get-tuple-element(%p), index=0
        ROOT %lt = pred[]{:T(512)} compare(%counter, %nine), direction=LT""",
        body=GATHER,
    )
    assert rows(text)[0][3] == 9


def test_a_loop_of_unknown_turns_counts_once_and_says_so():
    text = program(
        "%w = (s32[], f32[4]) while(%t), condition=%until, body=%body",
        until="ROOT %lt = pred[] compare(%a, %b), direction=GT",
        body=GATHER,
    )
    (found,) = summarise(read(text), (2, 4), TWO_SLICES, NETWORKS)
    assert (found.count, found.certain) == (1, False)


def test_fusions_and_branches_are_looked_into():
    text = program(
        "%f = f32[4] fusion(%p), kind=kLoop, calls=%fused",
        "%c = f32[4] conditional(%i, %p, %p), branch_computations={%fused, %other}",
        fused=GATHER,
        other=GATHER,
    )
    assert rows(text)[0][3] == 3


def test_a_tpu_collective_in_several_fusions_counts_once():
    parts = (
        "%g = f32[100] all-gather(%p), replica_groups=[2,4]<=[8], frontend_attributes="
        '{{chain_id="7"}}, backend_config={{"flag_start":"{}","flag_end":"8"}}'
    )
    text = program(
        "%s = (f32[4], u32[]) fusion(%p), calls=%start",
        "%m = f32[4] fusion(%s), calls=%middle",
        "%d = f32[4] fusion(%m), calls=%done",
        start=parts.format("-1"),
        middle=parts.format("2"),
        done=parts.format("2"),
    )
    assert rows(text)[0][3] == 1


def test_a_tpu_fusion_of_reduce_and_slice_is_a_reduce_scatter():
    line = "%r = f32[400] all-reduce(%p), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add"
    text = program(
        "%f = f32[100] fusion(%p), kind=kCustom, calls=%fused",
        **{"fused": line},
    ).replace("fused", "all-reduce-scatter.1")
    assert rows(text) == [("reduce-scatter", "device", "ICI", 1, 1600, 1200)]


def test_transfers_between_tpu_slices_are_on_the_data_centre_network():
    attributes = (
        'is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale'
        '_runtime",_xla_megascale_transfer_type="ALL_REDUCE"}'
    )
    text = program(
        f"%s = (f32[2,8,128]{{2,1,0}}, u32[], token[]) send(%p, %t), channel_id=15, {attributes}",
        f"%sd = token[] send-done(%s), channel_id=15, {attributes}",
        f"%r = (f32[2,8,128]{{2,1,0}}, u32[], token[]) recv(%t), channel_id=16, {attributes}",
        f"%rd = (f32[2,8,128]{{2,1,0}}, token[]) recv-done(%r), channel_id=16, {attributes}",
    )
    assert rows(text) == [("all-reduce", "node", "DCN", 1, 8192, 8192)]


@pytest.mark.parametrize(
    ("target", "axes", "sent"),
    [
        ("{{10,11,13,12,20,21,23,22}}", "node+device", 7 * 64),  # the own slice's share as well
        ("{{10,20},{11,21},{13,23},{12,22}}", "node", 4 * 64),
        ("{1,2}x{0:3}", "node", 4 * 64),
        ("{{30,40}}", "node", 4 * 64),  # devices that are not ours
    ],
)
def test_all_of_a_transfer_by_the_hosts_is_on_their_network(target, axes, sent):
    text = program(
        "%s = (f32[8,16]{1,0}, u32[], token[]) send(%p, %t), channel_id=4, is_host_transfer=true, "
        f"frontend_attributes={{_xla_megascale_target={target},"
        '_xla_megascale_transfer_type="ALL_TO_ALL"}'
    )
    found = read(text, TWO_SLICES, [10, 11, 13, 12, 20, 21, 23, 22])
    (row,) = summarise(found, (2, 4), TWO_SLICES, NETWORKS)
    assert (row.axes, row.network, row.bytes, row.sent) == (axes, "DCN", 512, sent)


def test_a_text_without_entry_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        read("HloModule nothing")


def test_a_program_without_collectives_has_none():
    assert rows(program('%a = f32[4] add(%p, %p), metadata={op_name="all-gather"}')) == []


def compiled():
    """A program whose collectives are known, compiled for 2 x 4 devices; as JSON."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec as P

    from jaxmodels.core import partitioning

    mesh = partitioning.make_mesh(2, 4)

    def body(x):
        def turn(carry, _):
            return jax.lax.psum(carry, "device") * 0.1, None

        x, _ = jax.lax.scan(turn, x, None, length=6)
        x = jax.lax.all_gather(x, "node")
        return jax.lax.ppermute(x, "device", [(i, (i + 1) % 4) for i in range(4)])

    specs = {"in_specs": P(("node", "device")), "out_specs": P(None, ("device",))}
    split = jax.shard_map(body, mesh=mesh, check_vma=False, **specs)
    text = jax.jit(split).lower(jnp.ones((8, 32))).compile().as_text()
    return rows(text)


def test_a_real_program_has_the_collectives_that_it_was_written_with():
    done = runs.python("-m", "tests.train.test_collectives", devices=8)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [
        ["all-gather", "node", "DCN", 1, 256, 128],
        ["all-reduce", "device", "ICI", 6, 6 * 128, 6 * 192],
        ["collective-permute", "device", "ICI", 1, 256, 256],
    ]


if __name__ == "__main__":
    print("\n" + json.dumps(compiled()))
