"""Launcher of `safegene serve`: checks every file, starts vLLM, reports when it is ready.

`build_command` turns options into a command and its environment without starting anything;
`launch` runs it. Never imports vLLM: the server is a child process.
"""

from safegene_vllm.launcher.command import Launch as Launch
from safegene_vllm.launcher.command import build_command as build_command
from safegene_vllm.launcher.config_file import read_config_file as read_config_file
from safegene_vllm.launcher.preflight import check_address as check_address
from safegene_vllm.launcher.process import launch as launch
from safegene_vllm.launcher.vllm_args import ServeOptions as ServeOptions
