#!/bin/sh
# LangChain and LiteLLM against our server: an environment with them beside the development one.
# Usage: scripts/judges.sh FOLDER     (FOLDER: where the environment is made, or found again)
set -eu
cd "$(dirname "$0")/.."
folder=${1:?usage: scripts/judges.sh FOLDER}
python=.venv/bin/python
if [ ! -x "$folder/bin/python" ]; then
    "$python" -m venv "$folder"
    # Everything that is installed already is used from there.
    "$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
        > "$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/development.pth"
    "$folder/bin/pip" install -q -c constraints.txt langchain-openai litellm
fi
LITELLM_LOCAL_MODEL_COST_MAP=True exec "$folder/bin/python" -m pytest -v -W ignore tests/serving/test_judges.py
