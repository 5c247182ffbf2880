# shellcheck shell=bash disable=SC2034  # what is set here is used by the launchers
# What the launchers share: reading arguments, and running or showing commands.
# Works with bash 3.2, which is what a Mac has.

# One sentence and exit code 2, as python -m atebm_jax.main does.
die() {
    echo "error: $*" >&2
    exit 2
}

# parse "OPTION ..." ARGUMENT...: fills config, workdir, extra and the variables that
# the options are named by; what is no option of a launcher goes to every process.
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
    [ -f "${config%%:*}" ] ||
        die "there is no config file ${config%%:*}: give one such as configs/digits.py, or configs/cifar10.py:small with a row."
}

# Every option that must have a value: need OPTION WHAT.
need() {
    [ -n "${!1}" ] || die "--$1 is missing: give $2."
}

# A positive whole number: positive OPTION.
positive() {
    [[ ${!1} =~ ^[1-9][0-9]*$ ]] || die "--$1 is ${!1}: give a positive whole number."
}

# All hosts must see one workdir: only a bucket, or what is said to be shared.
in_bucket() {
    [[ $workdir == gs://?*/?* ]] ||
        die "WORKDIR is $workdir: every host must reach the same folder, so give one in a bucket, gs://BUCKET/FOLDER."
}

# The command that every process runs: main_command PYTHON.
main_command() {
    command=("$1" -m atebm_jax.main "--config=$config" "--workdir=$workdir"
        ${extra[@]+"${extra[@]}"})
}

# Words as one line that a shell reads back as the same words.
quoted() {
    local line
    printf -v line '%q ' "$@"
    echo "${line% }"
}

# A name that is the same for the same workdir, of letters, digits and dashes.
job_name() {
    local digest
    digest=$(printf '%s' "$workdir" | cksum)
    echo "atebm-${digest%% *}"
}

# Runs a command, or with --dry_run only shows it.
run() {
    if [ -n "$dry_run" ]; then
        echo "would run: $(quoted "$@")"
    else
        "$@"
    fi
}

# The tool of a launcher: have TOOL WHERE_FROM. A dry run needs none.
have() {
    [ -n "$dry_run" ] || command -v "$1" >/dev/null ||
        die "$1 is not installed here: $2."
}
