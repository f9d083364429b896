"""Run by test_compile.py: one command of ours, recording each training step that it compiles.

python -m tests.train.program_script {train|compile} OUTPUT.json FLAGS...
"""

import hashlib
import json
import pathlib
import re
import sys

STEP = "jit_train_step"


def without_places(text: str) -> str:
    """A compiled program without the lines of source that it came from."""
    text = re.sub(r", metadata=\{[^{}]*\}", "", text)
    body = text.index("\n%") if "\n%" in text else text.index("\nENTRY")
    return text[:body].splitlines()[0].partition(", frontend_attributes")[0] + text[body:]


def main(command: str, output: str, flags: list[str]) -> None:
    """Runs the command; writes digests of the lowered and of the compiled text of its steps."""
    import jax

    found = []
    compile_lowered = jax.stages.Lowered.compile

    def recorded(self: jax.stages.Lowered, *arguments: object, **options: object) -> object:
        program = compile_lowered(self, *arguments, **options)
        lowered = self.as_text()
        if STEP in lowered.partition("\n")[0]:
            texts = lowered, without_places(program.as_text())
            found.append([hashlib.sha256(text.encode()).hexdigest()[:16] for text in texts])
        return program

    jax.stages.Lowered.compile = recorded
    if command == "train":
        from train import main as module
    else:
        from train import compile as module
    module.main(flags)
    pathlib.Path(output).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
