"Builds the package. Every fact about it comes from settings.ini."

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_namespace_packages, setup

parser = ConfigParser(delimiters=["="])
parser.read("settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
lib = cfg["lib_path"]
status = {"2": "2 - Pre-Alpha", "3": "3 - Alpha", "4": "4 - Beta", "5": "5 - Production/Stable"}[cfg["status"]]

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    project_urls={"Documentation": cfg["doc_host"] + cfg["doc_baseurl"]},
    license={"apache2": "Apache-2.0"}[cfg["license"]],
    license_files=["LICENSE"],
    keywords=cfg["keywords"].split(),
    classifiers=[
        f"Development Status :: {status}",
        f"Intended Audience :: {cfg['audience']}",
        f"Natural Language :: {cfg['language']}",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=f">={cfg['min_python']}",
    packages=find_namespace_packages(include=[lib, f"{lib}.*"], exclude=["*.__pycache__", "*.__pycache__.*"]),
    package_data={lib: cfg["package_data"].split()},
    install_requires=cfg["requirements"].split(),
    extras_require={"dev": cfg["dev_requirements"].split()},
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{lib}={lib}._modidx:d"],  # lets nbdev turn `names in backticks` into links
    },
    zip_safe=False,
)
