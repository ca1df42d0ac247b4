# Packs static binaries that were built outside; nothing is pulled, and there is nothing else in the image.
#
#   CGO_ENABLED=0 go build -trimpath -ldflags='-s -w' -o dist/ ./cmd/berthd ./cmd/berth
#   docker build --target berthd -t berthd .
#   docker build --target berth -t berth .
FROM scratch AS berthd
COPY dist/berthd /berthd
ENTRYPOINT ["/berthd"]

FROM scratch AS berth
COPY dist/berth /berth
ENTRYPOINT ["/berth"]
