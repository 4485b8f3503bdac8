#!/bin/sh
# gemma-mtp stands in front of Ollama's llama-server, which lies beside this file as llama-server.original.
# Put here by gemma-mtp ollama engine install; gemma-mtp ollama engine remove puts the original back.
#
# A Gemma 4 target with its drafter, on the CPU, is run by gemma-mtp's llama-server; whatever else by the original. Both
# by exec: Ollama ends the process that it started by SIGKILL, and nothing must be left.

# Set where this is installed: the folder of gemma-mtp's llama-server, and whether it reads the files of Ollama's library
# (one file with all encoders).
folder='@FOLDER@'
reads_library='@READS_LIBRARY@'

case $0 in */*) here=${0%/*} ;; *) here=. ;; esac
engine=$here/$folder

# says FILE KEY STRING: whether the first 64 KiB of a GGUF file have a key with a string of 6 or 16 bytes: key, type 8
# and length of the string, 4 and 8 bytes, string. The bytes of these numbers become capitals.
says() {
    case ${#3} in 6) length=S ;; 16) length=L ;; esac
    { dd if="$1" bs=65536 count=1 | LC_ALL=C tr '\000\006\010\020' 'ZSTL' | LC_ALL=C tr -cd 'A-Za-z0-9._-'; echo; } \
        2>/dev/null | LC_ALL=C grep -q -F -e "$2TZZZ${length}ZZZZZZZ$3"
}

# knows ARGUMENT...: whether gemma-mtp's llama-server has each of these flags. A later Ollama may have others.
knows() {
    for word do
        case $word in -[!0-9]*) printf '%s\n' "$word" ;; esac
    done | { ! grep -q -v -x -F -f "$engine/flags"; }
}

# starts: whether gemma-mtp's llama-server is there, whole, and built for this CPU.
starts() {
    said=$(LD_LIBRARY_PATH=$libraries "$engine/llama-server" --list-devices 2>&1) || return 1
    case $said in *'was built for a CPU'*) return 1 ;; esac
}

target='' drafter='' gpu=$GGML_BACKEND_PATH last=''
for word do
    case $last in
        --model) target=$word ;;
        --spec-draft-model) drafter=$word ;;
        -ngl) [ "$word" = 0 ] || gpu=$word ;;
    esac
    last=$word
done
# Backends that the original loads by itself.
for file in "$here"/libggml-*.so; do
    case ${file##*/} in
        libggml-base.so | libggml-cpu.so | libggml-cpu-*.so | libggml-blas.so | libggml-rpc.so | 'libggml-*.so') ;;
        *) gpu=$file ;;
    esac
done

# Ours find each other first; Ollama names its own folder in LD_LIBRARY_PATH, which beats what is built into them.
libraries=$engine${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
if [ -n "$target" ] && [ -n "$drafter" ] && [ -z "$gpu" ] && [ -x "$engine/llama-server" ] &&
    says "$target" general.architecture gemma4 && says "$drafter" general.architecture gemma4-assistant &&
    { [ "$reads_library" = yes ] || says "$target" tokenizer.ggml.model gemma4; } &&
    knows "$@" && starts; then
    LD_LIBRARY_PATH=$libraries
    export LD_LIBRARY_PATH
    exec "$engine/llama-server" "$@"
fi
exec "$here/llama-server.original" "$@"
