"""`train.main` in one process of a run that knows a family of published weights more: the toy's.

python -m tests.multiprocess.published FLAGS... [--home=FOLDER]

--home: where `~` is on this process.
"""

import os

from jaxmodels.weights import families
from tests.multiprocess import member
from tests.train import toy_weights
from train import cli, main

if __name__ == "__main__":
    for home in member.take("home"):
        os.environ["HOME"] = home
    families.known_families = lambda: {"toy": toy_weights.FAMILY}
    cli.run(main.main)
