package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
)

// podCommand is the stand-in itself as the first process of a pod.
const podCommand = "inside-pod"

// messageBytes is how much of a container's output becomes its termination message, as kubelet cuts
// it with FallbackToLogsOnError.
const messageBytes = 2048

// podGateway is the node's end of every pod's link.
const podGateway = "10.42.255.254"

// runPods runs the pods of this node with restartPolicy Never, each once: in a network namespace of
// its own, with the cluster's DNS, from the node's own files. An image that is no busybox is not
// here to be run: its pod succeeds at once.
func (n *node) runPods(ctx context.Context, client kubernetes.Interface) {
	var lock sync.Mutex
	stops := map[types.UID]context.CancelFunc{}
	ours := informers.NewSharedInformerFactoryWithOptions(client, 0,
		informers.WithTweakListOptions(func(o *metav1.ListOptions) {
			o.FieldSelector = fields.OneTermEqualSelector("spec.nodeName", n.name).String()
		}))
	informer := ours.Core().V1().Pods().Informer()
	seen := func(object any) {
		pod := object.(*corev1.Pod)
		lock.Lock()
		defer lock.Unlock()
		stop, known := stops[pod.UID]
		switch {
		case known && pod.DeletionTimestamp != nil:
			stop()
		case known || pod.DeletionTimestamp != nil || pod.Spec.RestartPolicy != corev1.RestartPolicyNever:
		case pod.Status.Phase == corev1.PodPending || pod.Status.Phase == "":
			inner, stop := context.WithCancel(ctx)
			stops[pod.UID] = stop
			go n.runPod(inner, client, pod.DeepCopy())
		case pod.Status.Phase == corev1.PodRunning:
			// It ran when this node was stopped.
			stops[pod.UID] = func() {}
			go setStatus(ctx, client, pod, corev1.PodFailed, "", ended{code: 137, reason: "Unknown"})
		}
	}
	informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    seen,
		UpdateFunc: func(_, object any) { seen(object) },
		DeleteFunc: func(object any) {
			if pod, ok := object.(*corev1.Pod); ok {
				lock.Lock()
				defer lock.Unlock()
				if stop, known := stops[pod.UID]; known {
					stop()
					delete(stops, pod.UID)
				}
			}
		},
	})
	ours.Start(ctx.Done())
	<-ctx.Done()
}

// ended is how a container ended.
type ended struct {
	code            int
	reason, message string
	started         time.Time
}

func (n *node) runPod(ctx context.Context, client kubernetes.Interface, pod *corev1.Pod) {
	container := pod.Spec.Containers[0]
	result := ended{reason: "Completed", started: time.Now()}
	address := ""
	if strings.Contains(container.Image, "busybox") {
		address = nextPodAddress()
		setStatus(ctx, client, pod, corev1.PodRunning, address, result)
		result = n.runContainer(ctx, pod, container, address)
	}
	phase := corev1.PodSucceeded
	if result.code != 0 {
		phase = corev1.PodFailed
	}
	setStatus(ctx, client, pod, phase, address, result)
}

var podCount atomic.Uint32

func nextPodAddress() string {
	count := podCount.Add(1)
	return fmt.Sprintf("10.42.%d.%d", 200+count/250%50, 1+count%250)
}

// runContainer runs a command in namespaces of its own and waits for its end.
func (n *node) runContainer(ctx context.Context, pod *corev1.Pod, container corev1.Container, address string) ended {
	result := ended{code: 128, reason: "StartError", started: time.Now()}
	if seconds := pod.Spec.ActiveDeadlineSeconds; seconds != nil {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Duration(*seconds)*time.Second)
		defer cancel()
	}
	argv := append(append([]string{}, container.Command...), container.Args...)
	if len(argv) == 0 {
		argv = []string{"sh"}
	}
	resolv, err := os.CreateTemp("", "resolv.conf-")
	if err != nil {
		result.message = err.Error()
		return result
	}
	defer os.Remove(resolv.Name())
	fmt.Fprintf(resolv, "search %s.svc.%s svc.%s %s\nnameserver %s\noptions ndots:5\n",
		pod.Namespace, n.domain, n.domain, n.domain, n.dns)
	resolv.Close()
	os.Chmod(resolv.Name(), 0o644)
	command := exec.CommandContext(ctx, "/proc/self/exe", append([]string{podCommand, resolv.Name(), address}, argv...)...)
	command.Args[0] = "k3s"
	command.Env = append(os.Environ(), "HOSTNAME="+pod.Name)
	for _, one := range container.Env {
		command.Env = append(command.Env, one.Name+"="+one.Value)
	}
	var output bytes.Buffer
	command.Stdout, command.Stderr = &output, &output
	command.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWUTS,
		Pdeathsig:  syscall.SIGKILL,
	}
	linked, err := command.StdinPipe()
	if err != nil {
		result.message = err.Error()
		return result
	}
	if err := command.Start(); err != nil {
		result.message = err.Error()
		return result
	}
	if err := link(command.Process.Pid, address); err != nil {
		command.Process.Kill()
		command.Wait()
		result.message = "linking the pod to its node: " + err.Error()
		return result
	}
	linked.Close()
	err = command.Wait()
	result.code, result.reason = command.ProcessState.ExitCode(), "Completed"
	if err != nil {
		result.reason = "Error"
	}
	if result.code < 0 {
		result.code = 137
	}
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		result.reason = "DeadlineExceeded"
	}
	text := output.Bytes()
	say("info", "pod %s/%s exited with %d: %s", pod.Namespace, pod.Name, result.code, text)
	if result.code != 0 && container.TerminationMessagePolicy == corev1.TerminationMessageFallbackToLogsOnError {
		result.message = string(text[max(0, len(text)-messageBytes):])
	}
	return result
}

// link joins a pod's network namespace to the node's.
func link(pid int, address string) error {
	name := fmt.Sprintf("veth%d", pid)
	pair := &netlink.Veth{
		LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: "eth0", PeerNamespace: netlink.NsPid(pid),
	}
	if err := netlink.LinkAdd(pair); err != nil {
		return err
	}
	here, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	if err := netlink.AddrAdd(here, &netlink.Addr{IPNet: host(podGateway)}); err != nil {
		return err
	}
	if err := netlink.LinkSetUp(here); err != nil {
		return err
	}
	return netlink.RouteAdd(&netlink.Route{LinkIndex: here.Attrs().Index, Dst: host(address)})
}

// insidePod is the first process of a pod: it waits until the node has linked it, and becomes the
// container's command. Arguments: resolv.conf, address, command...
func insidePod(arguments []string) error {
	resolv, address, argv := arguments[0], arguments[1], arguments[2:]
	if _, err := io.Copy(io.Discard, os.Stdin); err != nil {
		return err
	}
	if lo, err := netlink.LinkByName("lo"); err == nil {
		netlink.LinkSetUp(lo)
	}
	eth, err := netlink.LinkByName("eth0")
	if err != nil {
		return err
	}
	if err := netlink.AddrAdd(eth, &netlink.Addr{IPNet: host(address)}); err != nil {
		return err
	}
	if err := netlink.LinkSetUp(eth); err != nil {
		return err
	}
	gateway := &netlink.Route{LinkIndex: eth.Attrs().Index, Dst: host(podGateway), Scope: netlink.SCOPE_LINK}
	if err := netlink.RouteAdd(gateway); err != nil {
		return err
	}
	if err := netlink.RouteAdd(&netlink.Route{LinkIndex: eth.Attrs().Index, Gw: net.ParseIP(podGateway)}); err != nil {
		return err
	}
	if err := syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""); err != nil {
		return err
	}
	if err := syscall.Mount(resolv, "/etc/resolv.conf", "", syscall.MS_BIND, ""); err != nil {
		return err
	}
	if err := syscall.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		return err
	}
	path, err := exec.LookPath(argv[0])
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(127)
	}
	return syscall.Exec(path, argv, os.Environ())
}

func host(address string) *net.IPNet {
	return &net.IPNet{IP: net.ParseIP(address).To4(), Mask: net.CIDRMask(32, 32)}
}

// addLocalAddress gives the node an address of the services' network.
func addLocalAddress(address string) error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	return netlink.AddrReplace(lo, &netlink.Addr{IPNet: host(address)})
}

// setStatus writes what became of a pod. A pod that is gone meanwhile needs no status.
func setStatus(ctx context.Context, client kubernetes.Interface, pod *corev1.Pod, phase corev1.PodPhase, address string, how ended) {
	container := pod.Spec.Containers[0]
	started := metav1.NewTime(how.started)
	ready := corev1.ConditionFalse
	status := corev1.ContainerStatus{Name: container.Name, Image: container.Image}
	if phase == corev1.PodRunning {
		status.State.Running = &corev1.ContainerStateRunning{StartedAt: started}
		status.Ready, ready = true, corev1.ConditionTrue
	} else {
		status.State.Terminated = &corev1.ContainerStateTerminated{
			ExitCode: int32(how.code), Reason: how.reason, Message: how.message,
			StartedAt: started, FinishedAt: metav1.Now(),
		}
	}
	for ctx.Err() == nil || errors.Is(ctx.Err(), context.DeadlineExceeded) {
		one, err := client.CoreV1().Pods(pod.Namespace).Get(ctx, pod.Name, metav1.GetOptions{})
		if err != nil || one.UID != pod.UID {
			return
		}
		one.Status.Phase, one.Status.PodIP, one.Status.StartTime = phase, address, &started
		if address != "" {
			one.Status.PodIPs = []corev1.PodIP{{IP: address}}
		}
		if how.reason == "DeadlineExceeded" {
			one.Status.Reason = how.reason
		}
		one.Status.ContainerStatuses = []corev1.ContainerStatus{status}
		one.Status.Conditions = []corev1.PodCondition{
			{Type: corev1.PodInitialized, Status: corev1.ConditionTrue, LastTransitionTime: started},
			{Type: corev1.PodReady, Status: ready, LastTransitionTime: metav1.Now()},
			{Type: corev1.PodScheduled, Status: corev1.ConditionTrue, LastTransitionTime: started},
		}
		if _, err = client.CoreV1().Pods(pod.Namespace).UpdateStatus(ctx, one, metav1.UpdateOptions{}); err == nil {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
}
