"Package metadata, read from settings.ini, the one place where name, version and requirements are kept."
from configparser import ConfigParser
from pathlib import Path

import setuptools

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
readme = here / "README.md"


def requirements(key):  # split on blanks: shlex would eat the quotes in markers
    return cfg.get(f"{key}_requirements", "").split()


setuptools.setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="Apache-2.0",
    keywords=cfg["keywords"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    packages=setuptools.find_packages(include=[cfg["lib_path"] + "*"]),
    install_requires=cfg["requirements"].split(),
    extras_require={extra: requirements(extra) for extra in ("cpu", "cuda", "dev", "e2e", "interop", "data")},
    python_requires=">=" + cfg["min_python"],
    classifiers=[f"Programming Language :: Python :: {version}" for version in ("3", "3.11", "3.12", "3.13")],
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],
    },
    zip_safe=False,
)
