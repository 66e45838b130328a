"""Small models over everything that mace-torch can be configured to: each kind of block, order, depth and
option once."""

from __future__ import annotations

from dataclasses import replace

from .architectures import Architecture

INTERACTION_BLOCKS: tuple[str, ...] = (
    "RealAgnosticInteractionBlock",
    "RealAgnosticResidualInteractionBlock",
    "RealAgnosticDensityInteractionBlock",
    "RealAgnosticDensityResidualInteractionBlock",
    "RealAgnosticAttResidualInteractionBlock",
    "RealAgnosticResidualNonLinearInteractionBlock",
)
"""The interaction blocks of mace-torch 0.3.16."""

_BASE = Architecture(
    name="base",
    hidden_irreps="8x0e+8x1o",
    interaction_first="RealAgnosticResidualInteractionBlock",
    interaction="RealAgnosticResidualInteractionBlock",
    atomic_numbers=(1, 6, 8),
    r_max=4.5,
    num_bessel=6,
    max_ell=2,
    correlation=2,
    radial_MLP=(16, 16),
)

_HIDDEN = {0: "8x0e", 1: "8x0e+8x1o", 2: "8x0e+8x1o+8x2e"}

_EMBEDDINGS = {
    "total_spin": {
        "type": "categorical",
        "per": "graph",
        "in_dim": 1,
        "emb_dim": 8,
        "num_classes": 11,
        "offset": 0,
    },
    "total_charge": {
        "type": "categorical",
        "per": "graph",
        "in_dim": 1,
        "emb_dim": 8,
        "num_classes": 11,
        "offset": 5,
    },
}


def small_variants() -> dict[str, Architecture]:
    """Small architectures (8 channels; H, C and O), each different from the base in one thing.

    Building one takes about a second, evaluating it some tens of milliseconds.

    They go into :func:`mace_fast.zoo.build`. Two facts of mace-torch limit what there can be:

    - ``use_reduced_cg`` needs cuequivariance. Without it mace-torch silently builds the full basis, so the
      variant "reduced_cg" is a different model on a machine that has the package.
    - A one-layer model keeps only the first of its hidden irreps, the scalars.

    Returns:
        Architectures keyed by a name that says what is special: "block/<class>", "first/<class>", "L2",
        "correlation4", "layers3", "edge_irreps", and so on.
    """
    variants: dict[str, Architecture] = {}

    def add(name: str, **changes: object) -> None:
        variants[name] = replace(_BASE, name=name, **changes)  # type: ignore[arg-type]

    add("base")
    for block in INTERACTION_BLOCKS:
        add(f"block/{block}", interaction=block)
        add(f"first/{block}", interaction_first=block)
        add(f"both/{block}", interaction_first=block, interaction=block, hidden_irreps=_HIDDEN[2])
    for order, hidden in _HIDDEN.items():
        add(f"L{order}", hidden_irreps=hidden)
        add(f"L{order}_lmax3", hidden_irreps=hidden, max_ell=3, correlation=3)
    for correlation in (1, 2, 3, 4):
        add(f"correlation{correlation}", correlation=correlation)
    add("correlation_per_layer", correlation=(3, 1))
    for layers in (1, 2, 3):
        add(f"layers{layers}", num_interactions=layers)
    add("layers1_scalar", num_interactions=1, hidden_irreps=_HIDDEN[0])
    add(
        "layers1_nonlinear",
        num_interactions=1,
        interaction_first="RealAgnosticResidualNonLinearInteractionBlock",
        interaction="RealAgnosticResidualNonLinearInteractionBlock",
    )
    for number in (1, 5, 13, 33):
        add(f"channels{number}", hidden_irreps=f"{number}x0e+{number}x1o")
    add("one_element", atomic_numbers=(6,))

    add("mace", model="MACE")
    add("mace_density", model="MACE", interaction_first="RealAgnosticDensityInteractionBlock", correlation=3)
    add("multi_head", heads=("first", "second", "third"))
    add("multi_head_mace", heads=("first", "second"), model="MACE")
    add("edge_irreps", edge_irreps="4x0e+4x1o")
    add("edge_irreps_scalar", edge_irreps="4x0e")
    add("edge_irreps_first", edge_irreps="4x0e+4x1o", use_edge_irreps_first=True)
    nonlinear = "RealAgnosticResidualNonLinearInteractionBlock"
    add(
        "nonlinear_foundation",
        interaction_first=nonlinear,
        interaction=nonlinear,
        edge_irreps="4x0e+4x1o",
        use_edge_irreps_first=True,
        apply_cutoff=False,
        use_agnostic_product=True,
        pair_repulsion=True,
        distance_transform="Agnesi",
        heads=("first", "second"),
    )
    add(
        "embeddings",
        interaction_first=nonlinear,
        interaction=nonlinear,
        num_interactions=3,
        apply_cutoff=False,
        embedding_specs=_EMBEDDINGS,
    )
    add("embedding_readout", embedding_specs=_EMBEDDINGS, use_embedding_readout=True)

    for transform in ("Agnesi", "Soft"):
        add(f"transform_{transform}", distance_transform=transform)
    add("radial_gaussian", radial_type="gaussian")
    # mace-torch hands the distance in angstrom to polynomials that are bounded on [-1, 1] only: Agnesi
    # brings it there.
    add("radial_chebyshev", radial_type="chebyshev", distance_transform="Agnesi")
    add("pair_repulsion", pair_repulsion=True)
    add("agnostic_product", use_agnostic_product=True)
    add("no_cutoff_applied", apply_cutoff=False)
    add("no_cutoff_density", apply_cutoff=False, interaction="RealAgnosticDensityResidualInteractionBlock")
    add("reduced_cg", use_reduced_cg=True)
    add("so3", use_so3=True, hidden_irreps="8x0e+8x1e")
    add("keep_last_layer_irreps", keep_last_layer_irreps=True)
    add("last_readout_only", use_last_readout_only=True)
    add("gate_tanh", gate="tanh")
    add("cutoff_power6", num_polynomial_cutoff=6)
    return variants
