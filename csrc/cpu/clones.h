/* One binary for every processor of an architecture: what is compiled more than once, and chosen from when it runs. */
#ifndef KASMINA_CPU_CLONES_H
#define KASMINA_CPU_CLONES_H

#if defined(__x86_64__) && defined(__GNUC__) && !defined(KASMINA_NO_CLONES)
#define KASMINA_CHOOSES 1
#else
#define KASMINA_CHOOSES 0
#endif

/*
 * One clone per instruction set, chosen when the module is loaded, by what the processor can do: names of processors
 * (haswell, skylake-avx512), which older compilers must make do with, match nobody else's.
 */
#if !KASMINA_CHOOSES
#define KASMINA_CLONES
#elif !defined(__clang__) && __GNUC__ >= 12
#define KASMINA_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define KASMINA_CLONES __attribute__((target_clones("default", "arch=haswell", "arch=skylake-avx512")))
#endif

#endif
