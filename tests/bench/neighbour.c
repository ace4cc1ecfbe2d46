/* Takes as much of a core as it is given, and touches so much memory again and again: what a
 * process costs the one beside it that does nothing for it. Until it is killed, or its parent ends.
 *
 *     neighbour KB
 */
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <unistd.h>

#define LINE 64

int main(int count, char **words) {
    long kb = count == 2 ? strtol(words[1], NULL, 10) : 0;
    if (kb < 1) {
        fprintf(stderr, "neighbour KB\n");
        return 2;
    }
    pid_t parent = getppid();
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent)
        return 0;
    size_t lines = (size_t)kb * 1024 / LINE;
    volatile uint8_t *memory = calloc(lines, LINE);
    if (memory == NULL)
        return 1;
    for (;;)
        for (size_t at = 0; at < lines; at++)
            memory[at * LINE]++;
}
