"""How a model becomes ONNX graphs: `build_graphs.build`.

build_graphs.py      both programs' stages as one graph each, and their files
weight_files.py      where the weights lie, to which the graphs refer
translator.py        one traced stage, node by node, by the handlers
handlers_*.py        what each PyTorch operation is in ONNX
graph_builder.py     the graph under construction: nodes, constants, symbolic sizes
cuda_placement.py    whether every node would run on CUDA, and caches in place
"""
