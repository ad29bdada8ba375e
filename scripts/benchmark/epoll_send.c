/* The yardstick of fan-out: an epoll loop that makes one send() per socket and message.
 *
 *   epoll_send LISTENING_FD RECEIVERS FRAME_BYTES
 *
 * The first RECEIVERS connections receive, the one after them publishes. Every FRAME_BYTES bytes
 * that the publisher sends go to all receivers, then back to itself. Sockets block: who sends
 * faster than its receivers read waits, and loses nothing. Ends when the publisher goes away. */
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>

static char buffer[1 << 20];

static void send_all(int fd, const char *data, size_t size) {
    while (size > 0) {
        ssize_t sent = send(fd, data, size, MSG_NOSIGNAL);
        if (sent <= 0) return;
        data += sent;
        size -= sent;
    }
}

int main(int argc, char **argv) {
    if (argc != 4) return 64;
    int listener = atoi(argv[1]), receivers = atoi(argv[2]), on = 1;
    size_t size = atoi(argv[3]), held = 0;
    int *fds = malloc(sizeof(int) * (receivers + 1));
    int epoll = epoll_create1(0);
    for (int i = 0; i <= receivers; i++) {
        if ((fds[i] = accept(listener, NULL, NULL)) < 0) return 1;
        setsockopt(fds[i], IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        struct epoll_event event = {.events = EPOLLIN, .data.fd = fds[i]};
        epoll_ctl(epoll, EPOLL_CTL_ADD, fds[i], &event);
    }
    int publisher = fds[receivers];
    for (;;) {
        struct epoll_event ready[64];
        int count = epoll_wait(epoll, ready, 64, -1);
        for (int i = 0; i < count; i++) {
            if (ready[i].data.fd != publisher) {
                epoll_ctl(epoll, EPOLL_CTL_DEL, ready[i].data.fd, NULL);
                continue;
            }
            ssize_t got = recv(publisher, buffer + held, sizeof buffer - held, 0);
            if (got <= 0) return 0;
            held += got;
            size_t done = 0;
            for (; held - done >= size; done += size)
                for (int k = 0; k <= receivers; k++) send_all(fds[k], buffer + done, size);
            memmove(buffer, buffer + done, held - done);
            held -= done;
        }
    }
}
