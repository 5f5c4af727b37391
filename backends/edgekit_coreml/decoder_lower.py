"""A decoder to a ``.mlpackage`` of several functions over one set of weights and states."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgekit import evidence
from edgekit.artifact import Artifact
from edgekit.decoder import Decoder
from edgekit.errors import EdgekitError, LoweringFailed, UnsupportedRecipe
from edgekit.graph import first_line, quiet
from edgekit.host import installed_version
from edgekit.recipe import Recipe
from edgekit_coreml import DECODER_RECIPES, generate_on_mac
from edgekit_coreml.decoder_program import Size, program_from_decoder, state_names
from edgekit_coreml.lower import MAIN, PACKAGE, WEIGHTS, manifest

with quiet():
    import coremltools
    from coremltools.converters.mil.converter import mil_convert

# Few, since a device keeps each function that it loads: one token, what a draft of three or seven
# needs, and prompts, of which the last row alone is wanted.
SIZES = (Size(1, 1), Size(4, 4), Size(8, 8), Size(64, 64), Size(64, 1))


def artifact_from_decoder(
    decoder: Decoder, recipe: Recipe, folder: Path, report: Callable[[str], None]
) -> Artifact:
    """Build the program, save it into ``folder`` with the same bytes each time.

    Raises ``UnsupportedRecipe`` or ``LoweringFailed``.
    """
    if recipe not in DECODER_RECIPES:
        known = (each.precision for each in DECODER_RECIPES)
        raise UnsupportedRecipe("coreml", recipe.precision, known)
    half = recipe.weights != "float32"
    sizes = tuple(size for size in SIZES if size.width <= decoder.capacity)
    try:
        program = program_from_decoder(
            decoder, sizes, half=half, coded=recipe.quantized, report=report
        )
        report("writing the package")
        with quiet():
            _write(program, folder / PACKAGE)
    except (EdgekitError, OSError):
        raise
    except Exception as cause:  # the builder raises whatever it trips over
        raise LoweringFailed(
            f"coremltools could not build the decoder: {first_line(cause)}"
        ) from cause
    for module in (generate_on_mac, evidence):  # what runs it on a Mac
        source = Path(str(module.__file__))
        (folder / source.name).write_bytes(source.read_bytes())
    files = (MAIN, WEIGHTS, f"{PACKAGE}/Manifest.json", "generate_on_mac.py", "evidence.py")
    return Artifact(
        target="coreml",
        recipe=recipe,
        main=MAIN,
        files={name: folder / name for name in files},
        inputs=(),
        outputs=(),
        provenance={
            "minimum": "iOS18",  # the first with states
            "decoder": {
                "spec": decoder.spec.to_json(),
                "capacity": decoder.capacity,
                "functions": [
                    {"name": size.name, "width": size.width, "rows": size.rows} for size in sizes
                ],
                "states": state_names(decoder.spec.layers, half=half),
            },
            "versions": {"coremltools": installed_version("coremltools")},
        },
    )


def _write(program: Any, path: Path) -> None:
    """Saves the program; nothing in the files depends on the time or is drawn."""
    program.skip_all_passes = True  # it is built as it should be, and some take minutes
    program.export_as_multifunction = True
    model = mil_convert(
        program,
        convert_to="mlprogram",
        convert_from="milinternal",
        specification_version=coremltools.target.iOS18.value,
        compute_units=coremltools.ComputeUnit.CPU_ONLY,
        package_dir=str(path),
        skip_model_load=True,
    )
    spec = model.get_spec()
    spec.description.metadata.userDefined.pop("com.github.apple.coremltools.conversion_date", None)
    spec.description.metadata.shortDescription = "A decoder with its cache, exported by edgekit"
    (path.parent / MAIN).write_bytes(spec.SerializeToString(deterministic=True))
    (path / "Manifest.json").write_bytes(manifest(weights=True))
