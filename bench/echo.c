/* The floor of the round trip benchmark: answers every read with the same bytes. One argument: path of the UNIX stream socket to listen on. */
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

static int listen_at(const char *path)
{
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    int listener = socket(AF_UNIX, SOCK_STREAM, 0);

    if (listener < 0 || strlen(path) >= sizeof(address.sun_path))
        return -1;
    strcpy(address.sun_path, path);
    if (bind(listener, (struct sockaddr *)&address, sizeof(address)) < 0 || listen(listener, 1) < 0)
        return -1;
    return listener;
}

static void serve(int client)
{
    char buffer[4096];
    struct pollfd wanted = { .fd = client, .events = POLLIN };

    while (poll(&wanted, 1, -1) > 0) {
        ssize_t got = recv(client, buffer, sizeof(buffer), 0);
        if (got <= 0 || send(client, buffer, (size_t)got, MSG_NOSIGNAL) != got)
            return;
    }
}

int main(int count, char **arguments)
{
    int listener = count == 2 ? listen_at(arguments[1]) : -1;

    if (listener < 0)
        return 1;
    for (;;) {
        int client = accept(listener, NULL, NULL);
        if (client < 0)
            return 1;
        serve(client);
        close(client);
    }
}
