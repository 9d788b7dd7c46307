"""`medtpp doctor`: versions, devices, and what would be chosen here."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from medtpp.cli._common import console


def doctor(
    clear: Annotated[
        bool, typer.Option("--clear-cache", help="Delete the image cache; it is made anew when needed.")
    ] = False,
) -> None:
    """Show versions, devices, the precision chosen and why, and the size of the image cache."""
    import os
    import platform

    import psutil
    import torch

    from medtpp.adapter import package_versions
    from medtpp.data.cache import cache_root, cache_size, clear_cache
    from medtpp.training.device import choose_accelerator, choose_precision

    if clear:
        clear_cache()
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    for name, version in package_versions().items():
        table.add_row(name, version)
    table.add_row("system", f"{platform.system()} {platform.machine()}")
    memory = psutil.virtual_memory()
    table.add_row("processor", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads in use by torch")
    table.add_row("memory", f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        table.add_row(f"cuda:{index}", f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB")
    accelerator = choose_accelerator("auto")
    precision, reason = choose_precision("auto", accelerator)
    table.add_row("accelerator", accelerator)
    table.add_row("precision", f"{precision}: {reason}")
    table.add_row("image cache", f"{cache_size() / 2**20:.0f} MiB in {cache_root()}")
    console.print(table)
