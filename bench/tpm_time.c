/* Runs in a guest: tpm_time COUNT COMMAND-IN-HEX sends the command to /dev/tpm0 COUNT times, each after the answer to the one
   before, and prints what each took, in nanoseconds, a line each. See README.md. */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static long long now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

int main(int argc, char **argv)
{
    unsigned char command[4096], response[4096];
    if (argc != 3 || strlen(argv[2]) / 2 > sizeof command)
        return 2;
    long count = atol(argv[1]);
    size_t size = strlen(argv[2]) / 2;
    for (size_t i = 0; i < size; i++)
        if (sscanf(argv[2] + 2 * i, "%2hhx", command + i) != 1)
            return 2;
    long long *took = calloc(count, sizeof *took);
    int tpm = open("/dev/tpm0", O_RDWR);
    if (!took || tpm < 0) {
        perror("/dev/tpm0");
        return 1;
    }
    for (long n = 0; n < count; n++) {
        long long begin = now();
        if (write(tpm, command, size) != (ssize_t)size) {
            perror("write");
            return 1;
        }
        ssize_t got = read(tpm, response, sizeof response);
        took[n] = now() - begin;
        if (got < 10 || memcmp(response + 6, "\0\0\0\0", 4)) {
            fprintf(stderr, "the TPM did not answer with success\n");
            return 1;
        }
    }
    for (long n = 0; n < count; n++)
        printf("%lld\n", took[n]);
    return 0;
}
