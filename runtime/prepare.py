"""Prepares the app of a Space inside its pod, as init containers without privileges (uid 1000, all capabilities dropped).

    prepare.py source       copies the inline files, or fetches the git commit, into the app folder
    prepare.py environment  installs the app's requirements with uv into a virtual environment, and tells the operator on the
                            termination log which durations the app's functions declare
    prepare.py run          replaces itself with the app

Each step is a container of its own, so that kubectl and the Space's conditions say which one failed. A failure ends with one
line on the termination log that says what, where and the next step.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

APP = Path(os.environ.get("SPACEPORT_APP_DIR", "/home/user/app"))
INLINE = Path("/opt/spaceport/inline")
ENVIRONMENT = Path(os.environ.get("SPACEPORT_ENVIRONMENT_DIR", "/opt/environment"))
TERMINATION_LOG = Path("/dev/termination-log")
# An app folder is code, not data; the pod's emptyDir has its own limit.
README_BYTES_MAX = 1 << 20
DECLARED = Path(__file__).with_name("declared.py")
# kubelet keeps so much of the termination log.
REPORT_BYTES_MAX = 4096
# The scan ends itself after 10 s of computing; the rest is for a busy node.
SCAN_SECONDS_MAX = 30


class Failed(Exception):
    """Something the owner of the Space can act on."""


def front_matter(app: Path) -> dict[str, str]:
    """Scalars of the block between `---` lines at the top of README.md; nested values are left to the operator."""
    readme = app / "README.md"
    if not readme.is_file():
        return {}
    lines = readme.read_text(encoding="utf-8", errors="replace")[:README_BYTES_MAX].splitlines()
    if not lines or lines[0].strip() != "---":
        return {}
    values = {}
    for line in lines[1:]:
        if line.strip() == "---":
            return values
        match = re.match(r"^([A-Za-z_][A-Za-z0-9_]*):\s*(.*?)\s*$", line)
        if match:
            values[match.group(1)] = match.group(2).strip("\"'")
    return {}


def setting(name: str, key: str, default: str) -> str:
    """The Space's own spec (environment) wins over the front matter."""
    return os.environ.get(name) or front_matter(APP).get(key) or default


def run(command: list[str], what: str, next_step: str) -> None:
    print("+", " ".join(command), flush=True)
    code = subprocess.run(command, check=False).returncode
    if code != 0:
        raise Failed(f"{what} failed with exit status {code}; {next_step}")


def source() -> None:
    APP.mkdir(parents=True, exist_ok=True)
    url = os.environ.get("SPACEPORT_GIT_URL")
    if url:
        reference = os.environ.get("SPACEPORT_GIT_REF") or "HEAD"
        checkout = APP.parent / ".checkout"
        shutil.rmtree(checkout, ignore_errors=True)
        run(["git", "init", "--quiet", str(checkout)], "git init", "this is a fault of the platform")
        git = ["git", "-C", str(checkout)]
        run(
            [*git, "fetch", "--quiet", "--depth", "1", "--", url, reference],
            f"fetching {reference} of the repository",
            "check spec.source.git.url, ref and secretRef",
        )
        run([*git, "checkout", "--quiet", "--detach", "FETCH_HEAD"], "git checkout", "check spec.source.git.ref")
        commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
        folder = checkout / (os.environ.get("SPACEPORT_GIT_PATH") or ".")
        if not folder.resolve().is_relative_to(checkout.resolve()) or not folder.is_dir():
            raise Failed(f"spec.source.git.path names no folder in commit {commit[:12]}")
        shutil.rmtree(folder / ".git", ignore_errors=True)
        shutil.copytree(folder, APP, dirs_exist_ok=True, symlinks=True)
        shutil.rmtree(checkout, ignore_errors=True)
        print(f"source is commit {commit}", flush=True)
        TERMINATION_LOG.write_text(commit)
    else:
        for file in sorted(INLINE.rglob("*")):
            relative = file.relative_to(INLINE)
            # A ConfigMap volume keeps its versions in `..data` folders and shows files as links to them.
            if any(part.startswith("..") for part in relative.parts) or not file.is_file():
                continue
            target = APP / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
        print(f"source is {sum(1 for file in APP.rglob('*') if file.is_file())} inline files", flush=True)
    app_file = setting("SPACEPORT_APP_FILE", "app_file", "app.py")
    if not (APP / app_file).is_file():
        raise Failed(f"the source has no file {app_file!r}; add it or set spec.appFile (front matter: app_file)")


def environment() -> None:
    wanted = []
    requirements = APP / "requirements.txt"
    text = requirements.read_text(encoding="utf-8", errors="replace") if requirements.is_file() else ""
    names = {re.split(r"[^A-Za-z0-9._-]", line.strip(), maxsplit=1)[0].lower() for line in text.splitlines()}
    if setting("SPACEPORT_SDK", "sdk", "gradio") == "gradio":
        version = setting("SPACEPORT_SDK_VERSION", "sdk_version", "")
        if version:
            wanted.append(f"gradio=={version}")
        elif "gradio" not in names:
            wanted.append("gradio")
    if os.environ.get("SPACES_ZERO_GPU") == "true" and "spaces" not in names:
        wanted.append("spaces")
    python = ENVIRONMENT / "venv"
    # The cache lies on the environment's own filesystem, so that uv links instead of copying.
    cache = ENVIRONMENT / ".uv-cache"
    uv = ["uv", "--cache-dir", str(cache), "--no-progress"]
    run([*uv, "venv", "--quiet", "--clear", "--python", "/usr/bin/python3", str(python)], "making the environment", "this is a fault of the platform")
    command = [*uv, "pip", "install", "--compile-bytecode", "--python", str(python / "bin" / "python")]
    if text:
        command += ["--requirement", str(requirements)]
    command += wanted
    if text or wanted:
        run(command, "installing the requirements", "see the log of this container for the package, then mend requirements.txt")
    shutil.rmtree(cache, ignore_errors=True)
    if os.environ.get("SPACES_ZERO_GPU") == "true":
        tell_declared_durations()


def tell_declared_durations() -> None:
    """Requirement A14. In a process of its own, isolated from the app's folder: nothing in a source may end this container."""
    command = [sys.executable, "-I", str(DECLARED), str(APP), setting("SPACEPORT_APP_FILE", "app_file", "app.py")]
    try:
        scan = subprocess.run(command, check=False, stdout=subprocess.PIPE, timeout=SCAN_SECONDS_MAX)
        if scan.returncode != 0 or len(scan.stdout) > REPORT_BYTES_MAX:
            print(f"the declared durations were not found out (exit status {scan.returncode})", flush=True)
            return
        print("declared durations:", scan.stdout.decode().strip(), flush=True)
        TERMINATION_LOG.write_bytes(scan.stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        print(f"the declared durations were not found out: {error}", flush=True)


def start() -> None:
    app_file = setting("SPACEPORT_APP_FILE", "app_file", "app.py")
    python = ENVIRONMENT / "venv" / "bin" / "python"
    os.chdir(APP)
    os.execv(python, [str(python), "-u", app_file])


def main() -> int:
    steps = {"source": source, "environment": environment, "run": start}
    if len(sys.argv) != 2 or sys.argv[1] not in steps:
        print(f"usage: prepare.py {'|'.join(steps)}", file=sys.stderr)
        return 2
    try:
        steps[sys.argv[1]]()
    except Failed as failed:
        print(failed, file=sys.stderr, flush=True)
        try:
            TERMINATION_LOG.write_text(str(failed))
        except OSError as error:
            print(f"the termination log cannot be written: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
