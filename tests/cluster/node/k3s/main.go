// Command k3s stands in for k3s in the node container of a test: see ../README.md.
//
// As /bin/kubectl, /bin/crictl and /bin/ctr it is the tool of that name, as k3s is; as k3d-proxy and
// k3d-tools it is what k3d's two helper images run.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"
)

const (
	components    = "/usr/lib/k3s/"
	kubeconfig    = "/etc/rancher/k3s/k3s.yaml"
	versionInNode = "/etc/k3s-version"
)

func main() {
	arguments := os.Args[1:]
	name := filepath.Base(os.Args[0])
	if tool := name == "kubectl" || name == "crictl" || name == "ctr"; !tool && len(arguments) > 0 {
		name, arguments = arguments[0], arguments[1:]
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	var err error
	switch name {
	case "server":
		err = runServer(ctx, arguments)
	case "agent":
		err = runAgent(ctx, arguments)
	case "etcd-snapshot":
		err = etcdSnapshot(ctx, arguments)
	case "kubectl":
		err = kubectl(arguments)
	case "crictl":
		err = crictl(arguments)
	case "ctr":
		err = ctr(arguments)
	case "k3d-proxy":
		err = runProxy(ctx, "/etc/confd/values.yaml")
	case "k3d-tools":
		<-ctx.Done()
	case podCommand:
		err = insidePod(arguments)
	case "--version", "-v":
		fmt.Printf("k3s version %s (stand-in)\n", version())
	default:
		err = fmt.Errorf("No help topic for %q", name)
	}
	if err != nil && !errors.Is(err, context.Canceled) {
		say("fatal", "%v", err)
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			os.Exit(exit.ExitCode())
		}
		os.Exit(1)
	}
}

// say writes a line as k3s logs it; k3d waits for some of them.
func say(level, text string, values ...any) {
	fmt.Fprintf(os.Stderr, "time=%q level=%s msg=%q\n",
		time.Now().UTC().Format(time.RFC3339), level, fmt.Sprintf(text, values...))
}

// kubectl becomes kubectl, with the administrator's kubeconfig unless one is named.
func kubectl(arguments []string) error {
	if os.Getenv("KUBECONFIG") == "" {
		os.Setenv("KUBECONFIG", kubeconfig)
	}
	return syscall.Exec(components+"kubectl", append([]string{"kubectl"}, arguments...), os.Environ())
}
