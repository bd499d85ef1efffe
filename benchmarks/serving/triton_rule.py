"""The rule as a model of Triton's Python backend: what becomes rule/1/model.py in the repository.

From the members' logits to the decision, by models/ensemble.py on NumPy, or, where the repository has rule.onnx, by the graph
that the same source became.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as pb_utils

from benchmarks.serving.rule_file import OUTPUTS, read_rule
from models.ensemble import decide


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        folder = Path(args["model_repository"]) / args["model_version"]
        self.ensemble = read_rule(folder)
        self.session = None
        if (graph := folder / "rule.onnx").exists():
            options = ort.SessionOptions()
            options.intra_op_num_threads = options.inter_op_num_threads = 1
            options.log_severity_level = 3
            self.session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    def execute(self, requests: list[Any]) -> list[Any]:
        given = [
            [pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self.ensemble.members] for request in requests
        ]
        columns = self.decide([logits[0] if len(logits) == 1 else np.concatenate(logits) for logits in zip(*given, strict=True)])
        answers, start = [], 0
        for logits in given:
            end = start + len(logits[0])
            tensors = [pb_utils.Tensor(name, column[start:end]) for name, column in columns.items()]
            answers.append(pb_utils.InferenceResponse(output_tensors=tensors))
            start = end
        return answers

    def decide(self, logits: list[Any]) -> dict[str, Any]:
        """Columns with the images first; one number for each is (N, 1), as Triton has no empty shape beside the batch."""
        members = {
            name: np.ascontiguousarray(each.swapaxes(0, 1)) if each.ndim == 3 else each
            for name, each in zip(self.ensemble.members, logits, strict=True)
        }
        if self.session is None:
            decision = decide(self.ensemble, members)
            found = [getattr(decision, name) for name in OUTPUTS]
        else:
            found = self.session.run(list(OUTPUTS), members)
        n = len(logits[0])
        return {
            name: np.ascontiguousarray(column, dtype).reshape(n, -1)
            for (name, (_, dtype)), column in zip(OUTPUTS.items(), found, strict=True)
        }
