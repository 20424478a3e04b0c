"""The flow that TR-4928 prints, with its own client calls: python tr_4928.py HOST:PORT PHOTOGRAPH

What is sent is the tensor [1, 128, 32, 32] that the restorer makes of a release: it tells no more than the release.
"""

import sys

import cv2
import torch
import tritonclient.http as httpclient

import sfumato


def main(url: str, name: str) -> int:
    """Prints the server's statistics and how many faces were found."""
    protected = sfumato.load()
    frame = cv2.imread(name)
    # run forward pass: the first few layers, and the single additional line for private inference
    release = protected(frame, alpha=0.8)
    noisy_activation = protected.outside.restored(release)

    triton_client = httpclient.InferenceServerClient(url=url, verbose=False)
    model_name = "face_detection_noisy"
    inputs = [httpclient.InferInput("INPUT__0", [1, 128, 32, 32], "FP32")]
    inputs[0].set_data_from_numpy(noisy_activation.detach().cpu().contiguous().numpy(), binary_data=False)
    outputs = [
        httpclient.InferRequestedOutput("OUTPUT__0", binary_data=False),
        httpclient.InferRequestedOutput("OUTPUT__1", binary_data=False),
    ]
    results = triton_client.infer(model_name, inputs, outputs=outputs)
    statistics = triton_client.get_inference_statistics(model_name=model_name)
    print(statistics)
    if len(statistics["model_stats"]) != 1:
        print("FAILED: Inference Statistics")
        return 1
    loc, conf = (torch.from_numpy(results.as_numpy(one).copy()) for one in ("OUTPUT__0", "OUTPUT__1"))
    faces = protected.postprocess((loc, conf), frame.shape[:2]).above(0.5)
    print(f"{name}: {len(faces.scores)} faces")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
