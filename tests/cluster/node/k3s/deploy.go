package main

import (
	"bytes"
	"context"
	"embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// manifests is what k3s deploys into every cluster and others rely on; --disable leaves one out.
//
//go:embed manifests
var manifests embed.FS

// deploy writes the manifests where k3s has them, applies them, and applies them again whenever a
// file of that directory is written, as k3d does with the one of CoreDNS.
func (s *server) deploy(ctx context.Context) error {
	dir := filepath.Join(s.dir, "manifests")
	entries, err := manifests.ReadDir("manifests")
	if err != nil {
		return err
	}
	for _, entry := range entries {
		content, err := manifests.ReadFile("manifests/" + entry.Name())
		if err != nil {
			return err
		}
		if slices.Contains(s.disable, strings.TrimSuffix(entry.Name(), ".yaml")) {
			continue
		}
		text := strings.ReplaceAll(string(content), "CLUSTER_DNS", s.clusterDNS)
		if err := write(filepath.Join(dir, entry.Name()), text, 0o600); err != nil {
			return err
		}
	}
	applied := map[string]time.Time{}
	if err := s.applyWritten(ctx, dir, applied); err != nil {
		return err
	}
	// k3d waits for this line before it writes names of the host into the manifest.
	say("info", "Cluster dns configmap has been set successfully")
	go func() {
		for pause(ctx, 2*time.Second) == nil {
			if err := s.applyWritten(ctx, dir, applied); err != nil {
				say("error", "%v", err)
			}
		}
	}()
	return nil
}

func (s *server) applyWritten(ctx context.Context, dir string, applied map[string]time.Time) error {
	files, err := filepath.Glob(filepath.Join(dir, "*.yaml"))
	if err != nil {
		return err
	}
	for _, file := range files {
		seen, err := os.Stat(file)
		if err != nil || seen.ModTime().Equal(applied[file]) {
			continue
		}
		marked, err := marked(ctx, file)
		if err != nil {
			say("error", "%s: %v", filepath.Base(file), err)
			continue
		}
		for {
			command := exec.CommandContext(ctx, components+"kubectl", "apply", "--server-side",
				"--force-conflicts", "--field-manager=deploy@"+s.nodeName, "--filename=-",
				"--kubeconfig="+s.dir+"/cred/admin.kubeconfig")
			command.Stdin = bytes.NewReader(marked)
			said, err := command.CombinedOutput()
			if err == nil {
				break
			}
			// The namespace is not there yet, or a restarted server still repairs its allocators.
			say("info", "Waiting to deploy %s: %s", filepath.Base(file), said)
			if err := pause(ctx, 500*time.Millisecond); err != nil {
				return err
			}
		}
		applied[file] = seen.ModTime()
	}
	return nil
}

// marked is a manifest whose objects name the add-on that they are of, as wrangler's pkg/apply leaves
// it on them.
func marked(ctx context.Context, file string) ([]byte, error) {
	const owner = "objectset.rio.cattle.io/owner-"
	name := strings.TrimSuffix(filepath.Base(file), ".yaml")
	command := exec.CommandContext(ctx, components+"kubectl", "annotate", "--local", "--overwrite",
		"--filename="+file, "--output=yaml", owner+"gvk=k3s.cattle.io/v1, Kind=Addon",
		owner+"name="+name, owner+"namespace=kube-system")
	text, err := command.Output()
	if failed := (*exec.ExitError)(nil); errors.As(err, &failed) {
		return nil, fmt.Errorf("%s", failed.Stderr)
	}
	return text, err
}
