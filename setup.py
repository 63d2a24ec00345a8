"""Packaging of opensora_perflow. The version is read from the package, so that it is written in one place."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "([^"]+)"', (ROOT / "opensora_perflow" / "__init__.py").read_text(), re.M).group(1)

setup(
    name="opensora-perflow",
    version=VERSION,
    description="Few-step video generation for Open-Sora with Piecewise Rectified Flow (PeRFlow)",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The opensora_perflow maintainers",
    url="https://github.com/hpcaitech/Open-Sora",
    project_urls={"Open-Sora": "https://github.com/hpcaitech/Open-Sora", "PeRFlow": "https://arxiv.org/abs/2405.07510"},
    license="Apache-2.0",
    python_requires=">=3.10",
    # configs/ and patches/ stand at the top level of the repository, and inside the package where it is installed:
    # `opensora-perflow install` takes them from there (hosts/install.py).
    packages=[
        *find_packages(include=["opensora_perflow", "opensora_perflow.*"]),
        "opensora_perflow.configs",
        "opensora_perflow.patches",
    ],
    package_dir={"opensora_perflow.configs": "configs", "opensora_perflow.patches": "patches"},
    package_data={
        "opensora_perflow": ["py.typed", "tools/page/page.html", "tools/studio/*.html", "worlds/weights/*"],
        "opensora_perflow.configs": ["opensora/*.py", "opensora/_base_/*.py", "opensora/v2/*/*.py"],
        "opensora_perflow.patches": ["*.patch", "README.md"],
    },
    install_requires=[
        "torch>=2.2,<2.14",
        "mmengine>=0.10.3",
        "einops",
        "jinja2",
        "av>=12",
        "safetensors",
        "matplotlib",
        "tqdm",
        "numpy",
    ],
    extras_require={
        # Open-Sora pins its own colossalai (0.3.7 for v1.2.0, >= 0.4.1 for v1.3), so it is never required here.
        "train": ["colossalai>=0.3.7"],
        "lora": ["peft>=0.7.1"],
        "ui": ["gradio>=6,<7"],
        "test": ["pytest>=7", "peft>=0.7.1"],
        "docs": ["mkdocs-material>=9.5,<10"],
    },
    entry_points={"console_scripts": ["opensora-perflow = opensora_perflow.tools.cli:main"]},
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
