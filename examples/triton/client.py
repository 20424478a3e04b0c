"""Faces in photographs, found by a server that sees releases alone: python client.py URL PHOTOGRAPH [PHOTOGRAPH ...]"""

import sys
from pathlib import Path

import cv2

import sfumato
from sfumato.trusted.guard import Guard
from sfumato.trusted.keys import new_key_file, tenant_key
from sfumato.trusted.ledger import Ledger, Policy


def main(url: str, photographs: list[str]) -> None:
    """Prints what left, and writes NAME-faces.jpg for each."""
    key_file = Path("tenant.key")
    if not key_file.exists():
        new_key_file(key_file)
    guard = Guard(sfumato.load(), Ledger("ledger.db", Policy(min_alpha=0.6)), tenant_key(str(key_file)))
    with sfumato.Client(url, guard) as client:
        for name in photographs:
            frame = cv2.imread(name)
            release = guard(frame, alpha=0.8)  # the single additional line: entered in the ledger, then sent
            faces = client.result(client(release), frame.shape[:2]).above(0.5)
            print(
                f"{name}: {len(faces.scores)} faces, {release.nbytes / 1e3:.1f} kB, {release.bits[0]:.0f} bits at most"
            )
            for x1, y1, x2, y2 in faces.boxes.astype(int):
                cv2.rectangle(frame, (x1, y1), (x2, y2), (0, 0, 255), 2)
            cv2.imwrite(f"{Path(name).stem}-faces.jpg", frame)
        counted = client.statistics()["model_stats"][0]
        print(f"the server answered {counted['inference_count']} records of {counted['name']}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
