"""ONNX graphs for CUDA in which our Triton kernels are custom operators, made on a machine without a GPU.

recording.py     what an operation of `model/kernels` would launch, recorded from its own launch code
expressions.py   sizes in terms of B and L, as the operator library evaluates them
operation.py     a recorded operation as text: the attribute of one node of a graph
machine_code.py  kernels compiled for GPUs that are not here, and the file that holds them
pointwise.py     what follows the matrix products of a prefill, fused
last_tokens.py   the last token of each row, as a kernel
handlers.py      an operation of a traced stage -> a node
library.py       the operator library, built from `cpp/operators`
build.py         both graphs, the kernels' file and the library, beside the plain graphs
"""
