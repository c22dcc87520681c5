package main

import (
	"flag"
	"fmt"
	"io"
	"os"
	"strings"
)

// words is a flag that may be given several times; a comma separates values too, as with k3s.
type words []string

func (w *words) String() string { return strings.Join(*w, ",") }

func (w *words) Set(value string) error {
	*w = append(*w, strings.Split(value, ",")...)
	return nil
}

// lines is a flag that may be given several times and whose values may hold commas.
type lines []string

func (l *lines) String() string { return strings.Join(*l, " ") }

func (l *lines) Set(value string) error {
	*l = append(*l, value)
	return nil
}

// options are the arguments of `k3s server` and `k3s agent` that the stand-in acts on.
type options struct {
	dataDir, token, url, kubeconfig, kubeconfigMode string
	tokenFile, restorePath                          string
	nodeName, nodeIP, resolvConf                    string
	clusterCIDR, serviceCIDR, clusterDNS, nodePorts string
	clusterDomain                                   string
	clusterInit, encryptSecrets, disableAgent       bool
	clusterReset                                    bool
	disable, tlsSANs                                words
	apiserverArgs, controllerArgs, schedulerArgs    lines
	etcdArgs, nodeLabels, nodeTaints                lines
}

// Flags that k3s v1.31 knows and that change nothing here (docs.k3s.io/cli/server, .../agent).
var (
	agentWords = `log vmodule v node-external-ip node-internal-dns node-external-dns
		image-credential-provider-bin-dir image-credential-provider-config lb-server-port
		container-runtime-endpoint default-runtime image-service-endpoint pause-image snapshotter
		private-registry airgap-extra-registry flannel-iface flannel-conf flannel-cni-conf vpn-auth
		vpn-auth-file kubelet-arg kube-proxy-arg`
	agentSwitches = `debug alsologtostderr with-node-id selinux protect-kernel-defaults docker rootless
		prefer-bundled-bin disable-default-registry-endpoint`
	agentOnlySwitches = `disable-apiserver-lb enable-pprof`
	serverWords       = `bind-address https-listen-port advertise-address advertise-port flannel-backend
		egress-selector-mode servicelb-namespace write-kubeconfig-group helm-job-image agent-token
		agent-token-file kube-cloud-controller-manager-arg
		datastore-endpoint datastore-cafile datastore-certfile datastore-keyfile etcd-snapshot-name
		etcd-snapshot-schedule-cron etcd-snapshot-retention etcd-snapshot-dir etcd-s3-endpoint
		etcd-s3-endpoint-ca etcd-s3-access-key etcd-s3-secret-key etcd-s3-session-token etcd-s3-bucket
		etcd-s3-region etcd-s3-folder etcd-s3-proxy etcd-s3-config-secret etcd-s3-timeout
		default-local-storage-path system-default-registry kube-cloud-controller-arg`
	serverSwitches = `tls-san-security flannel-ipv6-masq flannel-external-ip
		etcd-expose-metrics etcd-disable-snapshots etcd-snapshot-compress etcd-s3
		etcd-s3-skip-ssl-verify etcd-s3-insecure disable-scheduler disable-cloud-controller
		disable-kube-proxy disable-network-policy disable-helm-controller disable-apiserver
		disable-controller-manager disable-etcd embedded-registry supervisor-metrics enable-pprof
		kine-tls`
)

// parse reads the arguments of `k3s server` or `k3s agent`, and refuses what k3s does not know.
func parse(role string, arguments []string) (*options, error) {
	o := &options{}
	set := flag.NewFlagSet("k3s "+role, flag.ContinueOnError)
	set.SetOutput(io.Discard)
	word := func(into *string, value string, names ...string) {
		for _, name := range names {
			set.StringVar(into, name, value, "")
		}
	}
	word(&o.dataDir, "/var/lib/rancher/k3s", "data-dir", "d")
	word(&o.token, os.Getenv("K3S_TOKEN"), "token", "t")
	word(&o.tokenFile, "", "token-file")
	word(&o.url, os.Getenv("K3S_URL"), "server", "s")
	word(&o.nodeName, os.Getenv("K3S_NODE_NAME"), "node-name")
	word(&o.nodeIP, "", "node-ip", "i")
	word(&o.resolvConf, environment("K3S_RESOLV_CONF", "/etc/resolv.conf"), "resolv-conf")
	set.Var(&o.nodeLabels, "node-label", "")
	set.Var(&o.nodeTaints, "node-taint", "")
	ignoredWords, ignoredSwitches := agentWords, agentSwitches
	if role == "agent" {
		ignoredSwitches += " " + agentOnlySwitches
	} else {
		ignoredWords += " " + serverWords
		ignoredSwitches += " " + serverSwitches
		word(&o.kubeconfig, os.Getenv("K3S_KUBECONFIG_OUTPUT"), "write-kubeconfig", "o")
		word(&o.kubeconfigMode, os.Getenv("K3S_KUBECONFIG_MODE"), "write-kubeconfig-mode")
		word(&o.clusterCIDR, "10.42.0.0/16", "cluster-cidr")
		word(&o.serviceCIDR, "10.43.0.0/16", "service-cidr")
		word(&o.nodePorts, "30000-32767", "service-node-port-range")
		word(&o.clusterDNS, "", "cluster-dns")
		word(&o.clusterDomain, "cluster.local", "cluster-domain")
		set.BoolVar(&o.clusterInit, "cluster-init", os.Getenv("K3S_CLUSTER_INIT") == "true", "")
		word(&o.restorePath, "", "cluster-reset-restore-path")
		set.BoolVar(&o.clusterReset, "cluster-reset", false, "")
		set.BoolVar(&o.encryptSecrets, "secrets-encryption", false, "")
		set.BoolVar(&o.disableAgent, "disable-agent", false, "")
		set.Var(&o.disable, "disable", "")
		set.Var(&o.tlsSANs, "tls-san", "")
		set.Var(&o.apiserverArgs, "kube-apiserver-arg", "")
		set.Var(&o.controllerArgs, "kube-controller-manager-arg", "")
		set.Var(&o.controllerArgs, "kube-controller-arg", "")
		set.Var(&o.schedulerArgs, "kube-scheduler-arg", "")
		set.Var(&o.etcdArgs, "etcd-arg", "")
	}
	for _, name := range strings.Fields(ignoredWords) {
		set.Var(new(lines), name, "")
	}
	for _, name := range strings.Fields(ignoredSwitches) {
		set.Bool(name, false, "")
	}
	arguments, err := configured(arguments)
	if err != nil {
		return nil, err
	}
	if err := set.Parse(arguments); err != nil {
		return nil, err
	}
	if o.token == "" && o.tokenFile != "" {
		o.token = strings.TrimSpace(string(mustRead(o.tokenFile)))
	}
	if set.NArg() > 0 {
		return nil, fmt.Errorf("k3s %s takes no operands: %s", role, strings.Join(set.Args(), " "))
	}
	if role == "agent" && (o.url == "" || o.token == "") {
		return nil, fmt.Errorf("--server and --token are required")
	}
	if o.nodeName == "" {
		o.nodeName, _ = os.Hostname()
	}
	o.nodeName = strings.ToLower(o.nodeName)
	return o, nil
}

func environment(name, otherwise string) string {
	if value := os.Getenv(name); value != "" {
		return value
	}
	return otherwise
}
