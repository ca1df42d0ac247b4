# Packs static binaries that were built outside; nothing is pulled, and there is nothing else in the image.
# berthd-ptyhost beside berthd owns the terminals with less memory than berthd itself takes for that.
#
#   CGO_ENABLED=0 go build -trimpath -ldflags='-s -w' -o dist/ ./cmd/berthd ./cmd/berthd-ptyhost ./cmd/berth
#   docker build --target berthd -t berthd .
#   docker build --target berth -t berth .
FROM scratch AS berthd
COPY dist/berthd dist/berthd-ptyhost /
ENTRYPOINT ["/berthd"]

FROM scratch AS berth
COPY dist/berth /berth
ENTRYPOINT ["/berth"]
