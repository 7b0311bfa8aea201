# megavlm on NVIDIA's PyTorch image. Not built and not run by the tests, which have no container runtime: they lint it.
#
#   docker build -t megavlm .
#   docker run --rm --gpus all --ipc=host --ulimit memlock=-1 -v "$PWD:/workspace" megavlm megavlm doctor
#   enroot import -o megavlm.sqsh dockerd://megavlm      (the image file that `megavlm launch slurm` names)
#
# 26.07 has Python 3.12, CUDA 13.3 and a build of torch 2.13, the reference stack's version. Beside torch the image brings
# what is built against it (Transformer Engine, apex; releases differ in whether flash-attn and DALI are there).
FROM nvcr.io/nvidia/pytorch:26.07-py3

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /opt/megavlm
COPY setup.py README.md LICENSE ./
COPY megavlm megavlm
COPY examples examples

# The image's own torch, and what was built against it, stay: pip may not replace any of these versions (the image names
# /etc/pip/constraint.txt in PIP_CONSTRAINT already; that list need not have torch itself). DALI is not in every release,
# so it is put in, with its decoders (nvImageCodec and all its codecs, which it requires). `cmp` fails if torch changed.
RUN python -c "import torch; print(torch.__version__)" >/tmp/torch-before \
    && pip list --format=freeze \
        | grep -iE '^(torch|torchvision|triton|pytorch-triton|transformer[-_]engine|flash[-_]attn|apex|numpy)==' \
        >/tmp/image-constraint.txt \
    && grep -q '^torch==' /tmp/image-constraint.txt \
    && pip install --no-cache-dir --constraint /tmp/image-constraint.txt ".[dali]" \
    && python -c "import torch; print(torch.__version__)" | cmp - /tmp/torch-before \
    && rm /tmp/torch-before /tmp/image-constraint.txt

# Under SLURM, pyxis maps the user who submits; with docker, this one is nobody's root.
RUN useradd --uid 10001 --create-home --shell /bin/bash trainer
USER 10001
WORKDIR /workspace

# An hour apart: it imports torch and asks for the devices, which a training run should not notice.
HEALTHCHECK --interval=1h --timeout=2m --start-period=1m CMD ["megavlm", "doctor"]
CMD ["megavlm", "--help"]
