// Command protogen compiles berth's .proto files and runs the two pinned code generators on them:
// protoc-gen-go for the messages and protoc-gen-go-drpc for the services. It needs no protoc.
//
// It is a module of its own so that none of this reaches berth's dependency list.
//
//	go run . ROOT     writes the .pb.go files below ROOT, the repository's root
package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/bufbuild/protocompile"
	"github.com/bufbuild/protocompile/protoutil"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/pluginpb"
)

const modulePath = "github.com/berthd/berth"

var sources = []string{
	"wire/tailnetpb/tailnet.proto",
	"wire/agentpb/agent.proto",
}

// generators are tools of this module, so its go.mod pins them.
var generators = []struct{ pkg, parameter string }{
	{"google.golang.org/protobuf/cmd/protoc-gen-go", "module=" + modulePath},
	{"storj.io/drpc/cmd/protoc-gen-go-drpc", "json=false,module=" + modulePath},
}

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: go run . ROOT")
		os.Exit(2)
	}
	if err := generate(context.Background(), os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "protogen:", err)
		os.Exit(1)
	}
}

func generate(ctx context.Context, root string) error {
	compiler := protocompile.Compiler{
		Resolver:       protocompile.WithStandardImports(&protocompile.SourceResolver{ImportPaths: []string{root}}),
		SourceInfoMode: protocompile.SourceInfoStandard,
	}
	files, err := compiler.Compile(ctx, sources...)
	if err != nil {
		return fmt.Errorf("cannot compile: %w", err)
	}
	var all []*descriptorpb.FileDescriptorProto
	seen := map[string]bool{}
	var add func(fd protoreflect.FileDescriptor)
	add = func(fd protoreflect.FileDescriptor) {
		if seen[fd.Path()] {
			return
		}
		seen[fd.Path()] = true
		for i := range fd.Imports().Len() {
			add(fd.Imports().Get(i).FileDescriptor)
		}
		all = append(all, protoutil.ProtoFromFileDescriptor(fd))
	}
	for _, f := range files {
		add(f)
	}
	for _, g := range generators {
		request := &pluginpb.CodeGeneratorRequest{
			FileToGenerate: sources,
			Parameter:      proto.String(g.parameter),
			ProtoFile:      all,
		}
		if err := run(ctx, root, g.pkg, request); err != nil {
			return fmt.Errorf("cannot run %s: %w", g.pkg, err)
		}
	}
	return nil
}

func run(ctx context.Context, root, pkg string, request *pluginpb.CodeGeneratorRequest) error {
	in, err := proto.MarshalOptions{Deterministic: true}.Marshal(request)
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, "go", "tool", pkg)
	cmd.Stdin, cmd.Stderr = bytes.NewReader(in), os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return err
	}
	var response pluginpb.CodeGeneratorResponse
	if err := proto.Unmarshal(out, &response); err != nil {
		return err
	}
	if response.Error != nil {
		return fmt.Errorf("%s", response.GetError())
	}
	for _, f := range response.File {
		path := filepath.Join(root, filepath.FromSlash(f.GetName()))
		if err := os.WriteFile(path, []byte(f.GetContent()), 0o644); err != nil {
			return err
		}
	}
	return nil
}
