package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	protocols "k8s.io/apimachinery/pkg/util/remotecommand"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/remotecommand"
	serving "k8s.io/kubelet/pkg/cri/streaming/remotecommand"
	utilexec "k8s.io/utils/exec"
)

// kubeletPort is where the API server reaches a node for `kubectl exec`; stages.yaml has it, too.
const kubeletPort = ":10250"

// imageRoots has, by the name of an image, the root file system that its containers see.
const imageRoots = "/var/lib/images"

// serveExec answers `kubectl exec` as kubelet does, to the API server alone.
func (n *node) serveExec(ctx context.Context, client kubernetes.Interface) error {
	authority := x509.NewCertPool()
	authority.AppendCertsFromPEM(mustRead(n.clientCA))
	handler := http.NewServeMux()
	handler.HandleFunc("/exec/{namespace}/{pod}/{container}", func(w http.ResponseWriter, r *http.Request) {
		options, err := serving.NewOptions(r)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		pod, err := client.CoreV1().Pods(r.PathValue("namespace")).Get(r.Context(), r.PathValue("pod"), metav1.GetOptions{})
		if err != nil {
			http.Error(w, err.Error(), http.StatusNotFound)
			return
		}
		serving.ServeExec(w, r, &executor{pod}, pod.Name, pod.UID, r.PathValue("container"),
			r.Form["command"], options, 4*time.Hour, 30*time.Second, protocols.SupportedStreamingProtocols)
	})
	server := &http.Server{
		Addr: kubeletPort, Handler: handler,
		TLSConfig: &tls.Config{ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: authority},
		// Its stream is taken over by another protocol, which HTTP/2 does not let it.
		TLSNextProto: map[string]func(*http.Server, *tls.Conn, http.Handler){},
	}
	go func() {
		<-ctx.Done()
		server.Close()
	}()
	return server.ListenAndServeTLS(n.certificate+".crt", n.certificate+".key")
}

type executor struct{ pod *corev1.Pod }

// ExecInContainer runs a command in the root file system of the container's image.
func (e *executor) ExecInContainer(ctx context.Context, _ string, _ types.UID, container string, argv []string, in io.Reader,
	out, err io.WriteCloser, _ bool, _ <-chan remotecommand.TerminalSize, _ time.Duration) error {
	root := ""
	for _, one := range e.pod.Spec.Containers {
		if one.Name == container {
			root = filepath.Join(imageRoots, strings.ReplaceAll(one.Image, ":", "-"))
		}
	}
	if _, failed := os.Stat(root); failed != nil {
		return errors.New("nothing runs in this container: " + failed.Error())
	}
	// By chroot, which finds the command in there.
	command := exec.CommandContext(ctx, "chroot", append([]string{root}, argv...)...)
	command.Stdout, command.Stderr = out, err
	command.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if in != nil {
		// Not as its Stdin: a command that ends is not waited for until there is no more input.
		input, failed := command.StdinPipe()
		if failed != nil {
			return failed
		}
		go func() {
			io.Copy(input, in)
			input.Close()
		}()
	}
	failed := command.Run()
	var exited *exec.ExitError
	if errors.As(failed, &exited) {
		return &utilexec.ExitErrorWrapper{ExitError: exited}
	}
	return failed
}
