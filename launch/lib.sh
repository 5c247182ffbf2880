# shellcheck shell=bash disable=SC2034  # what is set here is used by the launchers
# Shared by the launchers: reads arguments, and runs or shows commands.
# Works with bash 3.2, the version on a Mac.

# This folder is launch/ of a clone, or atebm_jax/launch/ where the package is installed.
above=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# A clone need not be installed: paths and python -m start at its root.
[ ! -f "$above/pyproject.toml" ] || cd "$above" || exit

# Ends with one sentence and exit code 2, like python -m atebm_jax.main.
die() {
    echo "error: $*" >&2
    exit 2
}

# parse "OPTION ..." ARGUMENT...: sets config, workdir, extra, and one variable per
# option, with the option's name. Arguments for the job itself go into extra.
parse() {
    local known=" $1 dry_run " usage argument name
    usage="usage: launch/$(basename "$0")"
    shift
    config="" workdir="" dry_run="" extra=()
    for argument in "$@"; do
        name=${argument#--}
        name=${name%%=*}
        case $argument in
        --dry_run) dry_run=1 ;;
        --config.*=* | --allow_config_change | --noallow_config_change)
            extra+=("$argument") ;;
        --*=*)
            [[ $known == *" $name "* ]] ||
                die "--$name is no option of $(basename "$0"): it knows$known, and fields of the config as --config.FIELD=VALUE."
            [ -n "${argument#*=}" ] || die "--$name is empty: give a value."
            printf -v "$name" '%s' "${argument#*=}" ;;
        -*) die "$argument has no value: write --OPTION=VALUE (only --dry_run and --allow_config_change stand alone)." ;;
        *)
            if [ -z "$config" ]; then
                config=$argument
            elif [ -z "$workdir" ]; then
                workdir=$argument
            else
                die "unexpected argument $argument: $usage [--OPTION=VALUE ...] CONFIG WORKDIR [--config.FIELD=VALUE ...]"
            fi ;;
        esac
    done
    [ -n "$workdir" ] ||
        die "CONFIG and WORKDIR are needed: $usage [--OPTION=VALUE ...] CONFIG WORKDIR [--config.FIELD=VALUE ...]"
    [ -f "${config%%:*}" ] || [ -f "$above/configs/${config%%:*}.py" ] ||
        die "there is no config file ${config%%:*}: give one such as configs/digits.py, or one of the package by its name such as digits, or with a row cifar10:small."
}

# need OPTION WHAT: refuses an option without a value.
need() {
    [ -n "${!1}" ] || die "--$1 is missing: give $2."
}

# positive OPTION: refuses anything but a positive whole number.
positive() {
    [[ ${!1} =~ ^[1-9][0-9]*$ ]] || die "--$1 is ${!1}: give a positive whole number."
}

# Refuses a workdir outside a bucket: all hosts must reach the same folder.
in_bucket() {
    [[ $workdir == gs://?*/?* ]] ||
        die "WORKDIR is $workdir: every host must reach the same folder, so give one in a bucket, gs://BUCKET/FOLDER."
}

# main_command PYTHON: sets command, which every process runs.
main_command() {
    command=("$1" -m atebm_jax.main "--config=$config" "--workdir=$workdir"
        ${extra[@]+"${extra[@]}"})
}

# Prints words as one line, quoted so that a shell reads the same words again.
quoted() {
    local line
    printf -v line '%q ' "$@"
    echo "${line% }"
}

# Prints a name of letters, digits and dashes, always the same for the same workdir.
job_name() {
    local digest
    digest=$(printf '%s' "$workdir" | cksum)
    echo "atebm-${digest%% *}"
}

# Runs a command. With --dry_run, only shows it.
run() {
    if [ -n "$dry_run" ]; then
        echo "would run: $(quoted "$@")"
    else
        "$@"
    fi
}

# have TOOL WHERE_FROM: refuses to go on without the tool. A dry run needs no tool.
have() {
    [ -n "$dry_run" ] || command -v "$1" >/dev/null ||
        die "$1 is not installed here: $2."
}
