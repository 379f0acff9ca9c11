"""The doctor tries what an export and a runtime need: compiler, torch, CUDA, ONNX Runtime.

checks.py       what is tried, and the command
machine.py      Python, cores, memory, disk
run_probes.py   runs probes in processes of their own
probes.py       the probes, a script
onnx_probe.py   the probe of ONNX Runtime, a script that uses the exporter
report.py       one check, and the table of all
"""
