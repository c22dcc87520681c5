package main

import (
	"context"
	_ "embed"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
)

// stages tell KWOK how a node and its pods go, except those with restartPolicy Never: see pods.go.
//
//go:embed stages.yaml
var stages string

// node is what kubelet and containerd are in k3s: a Node object, its pods, DNS for them.
type node struct {
	name, address, roles, resolvConf, dns, domain, kubeconfig, cidr string
	// The authority of those who may exec, and the path of its own certificate without its ending.
	clientCA, certificate string
	labels, taints        []string
	serveDNS              bool
}

func runAgent(ctx context.Context, arguments []string) error {
	o, err := parse("agent", arguments)
	if err != nil {
		return err
	}
	say("info", "Starting k3s agent (stand-in)")
	address, err := nodeAddress(o.nodeIP)
	if err != nil {
		return err
	}
	dir := filepath.Join(o.dataDir, "agent")
	if err := join(ctx, o.url, o.token, "agent", dir); err != nil {
		return err
	}
	file := filepath.Join(dir, "kubelet.kubeconfig")
	if err := write(file, kubeconfigText(o.url, dir+"/server-ca.crt", dir+"/client"), 0o600); err != nil {
		return err
	}
	n := &node{
		name: o.nodeName, address: address, resolvConf: o.resolvConf, dns: "10.43.0.10",
		domain: "cluster.local", kubeconfig: file, labels: o.nodeLabels, taints: o.nodeTaints,
		serveDNS: true, cidr: "10.42.0.0/16", clientCA: dir + "/client-ca.crt", certificate: dir + "/client",
	}
	return supervise(ctx, n.run)
}

// run registers the node, starts what makes its pods go, and returns.
func (n *node) run(ctx context.Context, running *processes) error {
	client, err := clientOf(n.kubeconfig)
	if err != nil {
		return err
	}
	if err := n.register(ctx, client); err != nil {
		return err
	}
	say("info", "Successfully registered node %s", n.name)
	// A kwok waits until the lease of the one before it has run out; kubelet renews its own at once.
	leases := client.CoordinationV1().Leases(corev1.NamespaceNodeLease)
	if err := leases.Delete(ctx, n.name, metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
		return err
	}
	file := "/var/lib/kwok/stages.yaml"
	text := strings.ReplaceAll(stages, "K3S_VERSION", version())
	if err := write(file, text, 0o644); err != nil {
		return err
	}
	if err := running.start("kwok", "--kubeconfig="+n.kubeconfig, "--config="+file,
		"--manage-single-node="+n.name, "--node-ip="+n.address, "--cidr="+n.cidr,
		"--node-lease-duration-seconds=40"); err != nil {
		return err
	}
	if n.serveDNS {
		if err := n.startDNS(running); err != nil {
			return err
		}
	}
	go n.runPods(ctx, client)
	go func() {
		if err := n.serveExec(ctx, client); ctx.Err() == nil {
			say("error", "kubectl exec is not served: %v", err)
		}
	}()
	return nil
}

func (n *node) register(ctx context.Context, client kubernetes.Interface) error {
	labels := map[string]string{
		"kubernetes.io/hostname": n.name, "kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64",
		"beta.kubernetes.io/os": "linux", "beta.kubernetes.io/arch": "amd64",
		"node.kubernetes.io/instance-type": "k3s",
	}
	for _, role := range strings.FieldsFunc(n.roles, func(r rune) bool { return r == ',' }) {
		labels["node-role.kubernetes.io/"+role] = "true"
	}
	for _, label := range n.labels {
		key, value, _ := strings.Cut(label, "=")
		labels[key] = value
	}
	var taints []corev1.Taint
	for _, taint := range n.taints {
		rest, effect, _ := strings.Cut(taint, ":")
		key, value, _ := strings.Cut(rest, "=")
		taints = append(taints, corev1.Taint{Key: key, Value: value, Effect: corev1.TaintEffect(effect)})
	}
	one := &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: n.name, Labels: labels},
		Spec:       corev1.NodeSpec{ProviderID: "k3s://" + n.name, Taints: taints},
	}
	for {
		_, err := client.CoreV1().Nodes().Create(ctx, one, metav1.CreateOptions{})
		if apierrors.IsAlreadyExists(err) {
			err = n.sayVersion(ctx, client)
		}
		if err == nil {
			return nil
		}
		say("error", "Waiting for the node to be registered: %v", err)
		if err := pause(ctx, time.Second); err != nil {
			return err
		}
	}
}

// sayVersion tells a cluster that knows the node which version it is of now.
func (n *node) sayVersion(ctx context.Context, client kubernetes.Interface) error {
	one, err := client.CoreV1().Nodes().Get(ctx, n.name, metav1.GetOptions{})
	if err != nil {
		return err
	}
	if one.DeletionTimestamp != nil {
		return fmt.Errorf("Node %s is being deleted", n.name)
	}
	one.Status.NodeInfo.KubeletVersion = version()
	_, err = client.CoreV1().Nodes().UpdateStatus(ctx, one, metav1.UpdateOptions{})
	return err
}

// startDNS runs CoreDNS at the cluster's DNS address, on this node for this node's pods.
func (n *node) startDNS(running *processes) error {
	if err := addLocalAddress(n.dns); err != nil {
		return err
	}
	file := "/var/lib/rancher/k3s/agent/etc/Corefile"
	corefile := fmt.Sprintf(`.:53 {
    bind %s
    errors
    kubernetes %s in-addr.arpa ip6.arpa {
        kubeconfig %s default
        pods insecure
        fallthrough in-addr.arpa ip6.arpa
    }
    forward . %s
    cache 30
    loadbalance
}
`, n.dns, n.domain, n.kubeconfig, n.resolvConf)
	if err := write(file, corefile, 0o644); err != nil {
		return err
	}
	return running.start("coredns", "-conf="+file)
}

func clientOf(file string) (*kubernetes.Clientset, error) {
	config, err := clientcmd.BuildConfigFromFlags("", file)
	if err != nil {
		return nil, err
	}
	return kubernetes.NewForConfig(config)
}
