"""Adapters of SMILE's layers: the whole layer with its gradients, its training, a router alone."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.core import partitioning
from jaxmodels.smile import Grid, MoeConfig, losses, moe, routing

from .fixtures import Case

ACTIVATIONS = {"gelu_tanh": "gelu_new"}
LOSSES = {"router": "aux", "inter": "aux_inter", "intra": "aux_intra"}
Arrays = dict[str, Any]


def config_of(case: Case, transport: str = "auto") -> MoeConfig:
    """The layer's settings; ValueError where our capacities differ from those the file names."""
    given = case.meta["config"]
    grid = Grid(given["n"], given["m"])
    config = MoeConfig(
        num_experts=grid.size * given["e"],
        d_ff=given["f"],
        grid=grid,
        routing=given["kind"],
        transport=transport,
        capacity_factor=given["capacity_factor_inter"],
        capacity_factor_intra=given.get("capacity_factor_intra"),
        intra_router="per_node" if given.get("per_node_intra_router") else "shared",
        alpha=given["alpha"],
        beta=given["beta"],
        z_coef=given["z_coef"],
        activation=ACTIVATIONS.get(given["activation"], given["activation"]),
        use_bias=given["bias"],
        min_capacity=given.get("min_capacity", 1),
        dtype=jnp.dtype(given.get("dtype", "float32")),
    )
    names = ("capacity",) if given["kind"] == "one_level" else ("capacity_inter", "capacity_intra")
    wanted = tuple(given[name] for name in names)
    if config.capacities(given["T"]) != wanted:
        raise ValueError(f"capacities {config.capacities(given['T'])}, the file has {wanted}")
    return config


def params_of(case: Case, config: MoeConfig) -> Arrays:
    """The layer's parameters."""
    params: Arrays = {name: jnp.asarray(case.params[f"{name}/w"]) for name in config.router_names}
    experts = {k: v for k, v in case.params.items() if k.startswith("experts/")}
    return params | {"experts": {k.split("/")[1]: jnp.asarray(v) for k, v in experts.items()}}


def named(params: Arrays, prefix: str) -> Arrays:
    """Parameters (or their gradients) by the names of the file."""
    experts = {f"{prefix}/experts/{k}": v for k, v in params["experts"].items()}
    return experts | {f"{prefix}/{k}/w": v for k, v in params.items() if k != "experts"}


@contextlib.contextmanager
def on_mesh(nodes: int, devices: int) -> Iterator[None]:
    """A mesh of simulated devices in scope."""
    with jax.set_mesh(partitioning.make_mesh(nodes, devices, jax.devices()[: nodes * devices])):
        yield


def everywhere(case: Case, compute: Callable[[str], Arrays]) -> list[Arrays]:
    """Results on one device and, where there are enough, on the file's mesh by each transport."""
    given = case.meta["config"]
    found = [compute("auto")]
    if 1 < given["n"] * given["m"] <= len(jax.devices()):
        with on_mesh(given["n"], given["m"]):
            transports = ("flat", "two_hop") if given["kind"] == "one_level" else ("two_hop",)
            found += [compute(transport) for transport in transports]
    return found


def moe_layer(case: Case) -> list[Arrays]:
    """One layer: every stage, the losses, and all gradients."""
    x, mask, dy = (jnp.asarray(case.inputs[name]) for name in ("x", "mask", "dy"))

    def compute(transport: str) -> Arrays:
        config = config_of(case, transport)

        def objective(params: Arrays, x: jax.Array) -> tuple[jax.Array, Any]:
            y, report, stages = moe.with_stages(params, x, config, mask, deterministic=False)
            auxiliary = moe.auxiliary_loss(report, config)
            return (y * dy).sum() + auxiliary, (y, report, stages, auxiliary)

        step = jax.jit(jax.value_and_grad(objective, (0, 1), has_aux=True))
        params = params_of(case, config)
        (_, (y, report, stages, auxiliary)), (grads, dx) = jax.device_get(step(params, x))
        outputs: Arrays = {
            "y": y,
            # Summed in float64: positive and negative terms may nearly cancel.
            "loss": (y.astype(np.float64) * case.inputs["dy"]).sum() + auxiliary,
            "aux_total": auxiliary,
            "expert_in": stages["expert_in"],
            "expert_out": stages["expert_out"],
            "group_sizes_kept": report.load.astype(np.int32),
            "group_sizes_dropless": group_sizes(params, x, mask, config),
            "grads/x": dx,
        } | named(grads, "grads")
        describe = one_level_outputs if config.routing == "one_level" else bi_level_outputs
        outputs |= measures(report) | describe(case, config, report, stages)
        return shaped(case, outputs)

    return everywhere(case, compute)


@jax.jit
def measures(report: moe.Report) -> Arrays:
    """Numbers of the whole layer."""
    dropped = report.dropped()
    found: Arrays = {"fraction_dropped": dropped["total"]}
    for kind, ending in (("device", ""), ("device_mean", "_device_mean"), ("global", "_global")):
        for level, value in report.balances(kind).items():
            found[LOSSES[level] + ending] = value
    for level, sums in report.levels.items():
        found["z_loss" if level == "router" else f"z_{level}"] = losses.z_loss(sums)
        found[f"fraction_dropped_{level}"] = dropped[level]
    return found


def group_sizes(params: Arrays, x: jax.Array, mask: jax.Array, config: MoeConfig) -> np.ndarray:
    """Rows of every expert with nothing dropped: sent on a mesh, seen by all on one device."""
    if config.transport == "two_hop":
        ragged = dataclasses.replace(config, transport="ragged")
        load = jax.jit(lambda params, x: moe.apply(params, x, ragged, mask)[1].load)(params, x)
    else:
        rows = x.reshape(-1, x.shape[-1])
        every = jax.jit(lambda params, x: moe.seen_by_all(params, x, config, mask.reshape(-1))[1])
        load = every(params, rows).load
    return np.asarray(load).astype(np.int32)


def shaped(case: Case, outputs: Arrays) -> Arrays:
    """Results by full name; [n, m, ...] becomes [n m, ...] where the file has it so."""
    found = {}
    for name, value in outputs.items():
        value, wanted = np.asarray(value), case.expected.get(f"outputs/{name}")
        fits = wanted is not None and wanted.size == value.size
        found[f"outputs/{name}"] = value.reshape(wanted.shape) if fits else value
    return found


def one_level_outputs(case: Case, config: MoeConfig, report: moe.Report, stages: Arrays) -> Arrays:
    """Names of the Switch layer's stages."""
    level, sums = stages["router"], report.levels["router"]
    cells, (capacity,) = config.grid.size, config.capacities(case.inputs["x"].shape[2])
    rows = np.maximum(sums.rows, 1)[..., None]
    ids = np.full((cells, config.experts_per_device, cells * capacity), -1, np.int32)
    slots = level.slots
    for source, (index, position, kept) in enumerate(
        zip(*(flat(a) for a in (level.routed.index, slots.position, slots.kept)), strict=True)
    ):
        for t in np.flatnonzero(kept):
            device, k = divmod(int(index[t]), config.experts_per_device)
            ids[device, k, source * capacity + position[t]] = source * len(kept) + t
    return {
        "router_logits": level.routed.logits,
        "router_probs": level.routed.probs,
        "expert_index": level.routed.index,
        "position": slots.position,
        "kept": slots.kept,
        "gate": level.routed.gate,
        "send_buffer": stages["send"],
        "expert_row_ids": ids,
        "send_counts": sums.chosen.astype(np.int32),
        "f_local": sums.chosen / rows,
        "P_local": sums.probs / rows,
    }


def flat(x: np.ndarray) -> np.ndarray:
    """[n, m, ...] -> [n m, ...]."""
    return x.reshape(-1, *x.shape[2:])


def bi_level_outputs(case: Case, config: MoeConfig, report: moe.Report, stages: Arrays) -> Arrays:
    """Names of the bi-level layer's stages, and what a source token sees of the second level."""
    inter, intra = stages["inter"], stages["intra"]
    valid = intra.routed.valid
    chosen = np.where(valid, intra.routed.index, -1)
    found = source_view(case, config, stages)
    for level, sums in report.levels.items():
        found[f"{level}_send_counts"] = sums.chosen.astype(np.int32)
    return found | {
        "inter_logits": inter.routed.logits,
        "inter_probs": inter.routed.probs,
        "inter_index": inter.routed.index,
        "inter_position": inter.slots.position,
        "inter_kept": inter.slots.kept,
        "inter_send": stages["send"],
        "inter_recv": stages["received"],
        "intra_logits": intra.routed.logits,
        "intra_probs": np.where(valid[..., None], intra.routed.probs, 0),
        "intra_index": chosen,
        "intra_position": intra.slots.position,
        "intra_kept": intra.slots.kept,
        "intra_send": stages["intra_send"],
        "gate_inter": inter.routed.gate,
        "aux_intra_source": intra_balance_of_sources(case, config),
    }


def source_view(case: Case, config: MoeConfig, stages: Arrays) -> Arrays:
    """Token ids in the buffers, and each token's way through both levels, seen from its source."""
    inter, intra = stages["inter"], stages["intra"]
    n, m, tokens = case.inputs["x"].shape[:3]
    first, second = config.capacities(tokens)
    e, buckets = config.experts_per_device, config.experts_per_node
    row_ids = np.full((n, m, n * first), -1, np.int32)
    expert_ids = np.full((n, m, e, m * second), -1, np.int32)
    index = np.full((n, m, tokens), -1, np.int32)
    gate, kept = np.zeros((n, m, tokens)), np.zeros((n, m, tokens), bool)
    for i, j, t in np.argwhere(inter.slots.kept):
        node = inter.routed.index[i, j, t]
        row = i * first + inter.slots.position[i, j, t]
        token = (i * m + j) * tokens + t
        bucket = int(intra.routed.index[node, j, row])
        row_ids[node, j, row] = token
        index[i, j, t] = node * buckets + bucket
        gate[i, j, t] = intra.routed.gate[node, j, row]
        kept[i, j, t] = intra.slots.kept[node, j, row]
        if kept[i, j, t]:
            device, k = divmod(bucket, e)
            place = j * second + intra.slots.position[node, j, row]
            expert_ids[node, device, k, place] = token
    return {
        "inter_row_ids": row_ids,
        "expert_row_ids": expert_ids,
        "expert_index": index,
        "gate_intra": gate,
        "kept": kept,
        "gate": np.where(kept, gate * inter.routed.gate, 0),
    }


def intra_balance_of_sources(case: Case, config: MoeConfig) -> jax.Array:
    """The second router's balance over each device's own tokens, wherever they go."""
    kernels = case.params["router_intra/w"]
    if kernels.ndim == 2:
        kernels = np.broadcast_to(kernels, (config.grid.nodes, *kernels.shape))
    first = case.params["router_inter/w"]

    def of_device(x: jax.Array, mask: jax.Array) -> losses.RouterSums:
        node = routing.route(x, first, mask).index
        every = jax.vmap(lambda kernel: routing.route(x, kernel, mask))(jnp.asarray(kernels))
        own = jax.tree.map(lambda leaf: leaf[node, jnp.arange(x.shape[0])], every)
        return losses.router_sums(own, mask)

    x, mask = (flat(case.inputs[name]) for name in ("x", "mask"))
    every = jax.jit(lambda x, mask: losses.balance_loss(jax.vmap(of_device)(x, mask)))
    return every(x, mask.astype(bool))


def moe_sgd(case: Case) -> list[Arrays]:
    """Plain gradient steps of a toy regression."""
    given = case.meta["config"]
    x, target = jnp.asarray(case.inputs["x"]), jnp.asarray(case.inputs["target"])

    def compute(transport: str) -> Arrays:
        config = config_of(case, transport)

        def objective(params: Arrays) -> tuple[jax.Array, moe.Report]:
            y, report = moe.apply(params, x, config, deterministic=False)
            error = jnp.square(x + y - target).mean()
            return error + moe.auxiliary_loss(report, config), report

        def step(params: Arrays, _: None) -> tuple[Arrays, Arrays]:
            (loss, report), grads = jax.value_and_grad(objective, has_aux=True)(params)
            record = {"loss": loss, "fraction_dropped": report.dropped()["total"]}
            for level, value in report.balances().items():
                record[LOSSES[level]] = value
            return jax.tree.map(lambda p, g: p - given["lr"] * g, params, grads), record

        run = jax.jit(lambda params: jax.lax.scan(step, params, None, given["steps"]))
        params, records = run(params_of(case, config))
        return shaped(case, records | named(params, "params_after"))

    return everywhere(case, compute)


def router_only(case: Case) -> Arrays:
    """A router alone: logits with and without noise, its statistics, and its bfloat16 choices."""
    given = (*(case.inputs[name] for name in ("x", "mask", "noise")), case.params["router/w"])
    # In a program of its own: within another one, the product need not be rounded to bfloat16.
    low = jnp.matmul(*(jnp.asarray(array, jnp.bfloat16) for array in (given[0], given[3])))
    found = alone(*given) | {"index_if_router_in_bfloat16": np.asarray(low).argmax(-1)}
    return {f"outputs/{name}": value for name, value in found.items()}


@jax.jit
def alone(x: jax.Array, mask: jax.Array, noise: jax.Array, kernel: jax.Array) -> Arrays:
    """What a router says of x [rows, d]."""
    mask = mask.astype(bool)
    plain, noisy = routing.route(x, kernel, mask), routing.route(x, kernel, mask, noise)
    sums = losses.router_sums(plain, mask)
    return {
        "logits": plain.logits,
        "probs": plain.probs,
        "index": plain.index,
        "gate": plain.gate,
        "logits_jitter": noisy.logits,
        "probs_jitter": noisy.probs,
        "index_jitter": noisy.index,
        "lse": jax.nn.logsumexp(plain.logits, axis=-1),
        "z_loss": losses.z_loss(sums),
        "f": sums.chosen / sums.rows,
        "P": sums.probs / sums.rows,
        "aux": losses.balance(sums),
    }
