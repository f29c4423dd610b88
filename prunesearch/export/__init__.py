"""Export: schedule files with weights, fixed counts in place of thresholds, and files for ONNX Runtime and OpenVINO."""

from typing import TYPE_CHECKING

from prunesearch.registry import lazily

if TYPE_CHECKING:
    from prunesearch.export.deploy import export_onnx as export_onnx
    from prunesearch.export.deploy import export_openvino as export_openvino
    from prunesearch.export.example import example_code as example_code
    from prunesearch.export.file_facts import read_facts as read_facts
    from prunesearch.export.schedules import export as export
    from prunesearch.export.schedules import measure_again as measure_again

__getattr__ = lazily(
    __name__,
    {
        "example_code": "prunesearch.export.example",
        "export": "prunesearch.export.schedules",
        "export_onnx": "prunesearch.export.deploy",
        "export_openvino": "prunesearch.export.deploy",
        "measure_again": "prunesearch.export.schedules",
        "read_facts": "prunesearch.export.file_facts",
    },
)
