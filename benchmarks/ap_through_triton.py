"""Average precision through a real Triton against that in this process, of the very same releases.

    python benchmarks/ap_through_triton.py --dataset FDDB --limit 20 [--protocol grpc]

Every photograph is released once, under keyed noise; its release is answered by the server and by `Outside` here.
Prints both AP (IoU .5, boxes as detected) and the largest difference of any output. Exits 1 where AP differs by more
than 1e-6.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from sfumato import facade
from sfumato.datasets import fddb, images
from sfumato.outside import repository, serving
from sfumato.tasks.detection.precision import average_precision
from sfumato.trusted.client import Client
from sfumato.trusted.guard import Guard
from sfumato.trusted.ledger import Ledger, Policy
from sfumato.trusted.noise import Keyed

KEY = bytes(range(32))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, required=True, help="FDDB")
    parser.add_argument("--limit", type=int, default=20, help="photographs of each fold")
    parser.add_argument("--protocol", choices=["http", "grpc"], default="http")
    parser.add_argument("--alpha", type=float, default=0.8)
    options = parser.parse_args()
    protected, data = facade.load().with_noise(Keyed(KEY)), fddb.load(options.dataset)
    entries = [entry for fold in data.folds for entry in fold[: options.limit]]
    there, here, truths, largest = [], [], [], 0.0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        server_file = facade.SHIPPED / facade.SERVERS["adapted"]
        assert protected.outside is not None and protected.reference is not None
        plan = repository.Plan(
            task=protected.task.name, outside=protected.outside, base=protected.reference,  # type: ignore[arg-type]
            server=server_file, model_digest=facade.face_split().digest(), ndim=4, size=(32, 32),
        )  # fmt: skip
        repository.write(plan, folder / "models")
        guard = Guard(protected, Ledger(folder / "ledger.db", Policy()), KEY)
        with serving.serve(folder / "models", ports=(0, 0, 0)) as server:
            port = server.http if options.protocol == "http" else server.grpc
            with Client(f"{options.protocol}://127.0.0.1:{port}", guard) as client:
                for entry in tqdm(entries, "photographs"):
                    image = images.read(entry.path)
                    release, size = guard(image, options.alpha), (image.shape[0], image.shape[1])
                    answers, own = client(release), protected.outside(release)
                    largest = max(
                        largest, *(float(np.abs(a - o.numpy()).max()) for a, o in zip(answers, own, strict=True))
                    )
                    there.append(client.result(answers, size))
                    here.append(protected.postprocess(own, size))
                    truths.append(entry.boxes)
                counted = client.statistics()["model_stats"][0]["inference_count"]
    outside, inside = average_precision(there, truths), average_precision(here, truths)
    faces = sum(map(len, truths))
    print(f"{len(entries)} photographs of {options.dataset}, {faces} faces, alpha {options.alpha}, keyed noise")
    print(f"AP through Triton ({options.protocol}, which counted {counted} records): {outside:.8f}")
    print(f"AP in this process: {inside:.8f}; difference {abs(outside - inside):.1e}, of outputs at most {largest:.1e}")
    return int(abs(outside - inside) > 1e-6)


if __name__ == "__main__":
    sys.exit(main())
