package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// server is one k3s server: where it keeps what, and what it was told.
type server struct {
	*options
	dir, tls, address, apiAddress string
	authorities                   map[string]*authority
	opening                       opening
	lock                          sync.Mutex // of token, which may be rotated
}

// The files that every server of a cluster has alike, below the server's directory.
var shared = []string{
	"tls/server-ca.crt", "tls/server-ca.key", "tls/client-ca.crt", "tls/client-ca.key",
	"tls/request-header-ca.crt", "tls/request-header-ca.key", "tls/service.key",
	"tls/etcd/server-ca.crt", "tls/etcd/server-ca.key", "tls/etcd/peer-ca.crt",
	"tls/etcd/peer-ca.key", "cred/encryption-config.json",
}

func runServer(ctx context.Context, arguments []string) error {
	o, err := parse("server", arguments)
	if err != nil {
		return err
	}
	s := &server{options: o, dir: filepath.Join(o.dataDir, "server"), opening: readOpening()}
	s.tls = filepath.Join(s.dir, "tls")
	say("info", "Starting k3s (stand-in)")
	if s.address, err = nodeAddress(o.nodeIP); err != nil {
		return err
	}
	if s.clusterDNS == "" {
		if s.clusterDNS, err = serviceAddress(s.serviceCIDR, 10); err != nil {
			return err
		}
	}
	if err := s.prepare(ctx); err != nil {
		return err
	}
	if s.clusterReset {
		return s.reset(ctx)
	}
	return supervise(ctx, s.bringUp)
}

// prepare makes or reads all files that the components need.
func (s *server) prepare(ctx context.Context) error {
	if s.token == "" {
		s.token = rememberedToken(s.dir)
	}
	if _, password, found := strings.Cut(s.token, "::server:"); found {
		s.token = password
	}
	if s.url != "" && !exists(filepath.Join(s.tls, "server-ca.crt")) {
		if err := join(ctx, s.url, s.token, "server", s.dir); err != nil {
			return err
		}
	}
	s.authorities = map[string]*authority{}
	for file, name := range map[string]string{
		"server-ca": "k3s-server-ca", "client-ca": "k3s-client-ca", "etcd/peer-ca": "etcd-peer-ca",
		"request-header-ca": "k3s-request-header-ca", "etcd/server-ca": "etcd-server-ca",
	} {
		var err error
		if s.authorities[file], err = open(filepath.Join(s.tls, file), name); err != nil {
			return err
		}
	}
	if err := s.issueCertificates(); err != nil {
		return err
	}
	if file := filepath.Join(s.tls, "service.key"); !exists(file) {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return err
		}
		if err := writeKey(file, key); err != nil {
			return err
		}
	}
	if err := s.writeEncryption(); err != nil {
		return err
	}
	if err := s.writeToken(); err != nil {
		return err
	}
	return s.writeKubeconfigs()
}

func (s *server) writeToken() error {
	digest := sha256.Sum256(mustRead(filepath.Join(s.tls, "server-ca.crt")))
	token := fmt.Sprintf("K10%s::server:%s\n", hex.EncodeToString(digest[:]), s.token)
	return write(filepath.Join(s.dir, "token"), token, 0o600)
}

func (s *server) issueCertificates() error {
	first, err := serviceAddress(s.serviceCIDR, 1)
	if err != nil {
		return err
	}
	hostname, _ := os.Hostname()
	hosts := append([]string{
		"kubernetes", "kubernetes.default", "kubernetes.default.svc",
		"kubernetes.default.svc." + s.clusterDomain, "localhost", "127.0.0.1", hostname, first,
		s.address,
	}, s.tlsSANs...)
	lifetime := time.Duration(s.opening.CertificateDays) * day
	for _, one := range []struct{ authority, file, name, organization string }{
		{"server-ca", "serving-kube-apiserver", "kube-apiserver", ""},
		{"client-ca", "client-admin", "system:admin", "system:masters"},
		{"client-ca", "client-controller", "system:kube-controller-manager", ""},
		{"client-ca", "client-scheduler", "system:kube-scheduler", ""},
		{"client-ca", "client-kubelet", "system:node:" + s.nodeName, "system:nodes"},
		{"client-ca", "client-kube-apiserver", "system:apiserver", "system:masters"},
		{"request-header-ca", "client-auth-proxy", "system:auth-proxy", ""},
		{"etcd/server-ca", "etcd/server-client", "etcd-server", ""},
		{"etcd/peer-ca", "etcd/peer-server-client", "etcd-peer", ""},
	} {
		of := subject{one.name, one.organization, nil}
		if strings.Contains(one.authority, "server") || strings.Contains(one.authority, "peer") {
			of.hosts = hosts
		}
		if err := s.authorities[one.authority].issue(filepath.Join(s.tls, one.file), of, lifetime); err != nil {
			return err
		}
	}
	return nil
}

// writeEncryption makes the key of --secrets-encryption, once.
func (s *server) writeEncryption() error {
	file := filepath.Join(s.dir, "cred", "encryption-config.json")
	if !s.encryptSecrets || exists(file) {
		return nil
	}
	key := make([]byte, 32)
	if _, err := rand.Read(key); err != nil {
		return err
	}
	aes := map[string]any{"aescbc": map[string]any{"keys": []any{map[string]any{
		"name": "aescbckey", "secret": base64.StdEncoding.EncodeToString(key),
	}}}}
	config, err := json.Marshal(map[string]any{
		"kind": "EncryptionConfiguration", "apiVersion": "apiserver.config.k8s.io/v1",
		"resources": []any{map[string]any{
			"resources": []string{"secrets"},
			"providers": []any{aes, map[string]any{"identity": map[string]any{}}},
		}},
	})
	if err != nil {
		return err
	}
	return write(file, string(config), 0o600)
}

// writeKubeconfigs writes one for each component, and the administrator's where k3s is told to.
func (s *server) writeKubeconfigs() error {
	for name, certificate := range map[string]string{
		"controller": "client-controller", "scheduler": "client-scheduler", "admin": "client-admin",
	} {
		text := kubeconfigText("https://127.0.0.1:6443", s.tls+"/server-ca.crt", filepath.Join(s.tls, certificate))
		if err := write(filepath.Join(s.dir, "cred", name+".kubeconfig"), text, 0o600); err != nil {
			return err
		}
	}
	mode := os.FileMode(0o600)
	if value, err := strconv.ParseUint(s.kubeconfigMode, 8, 32); err == nil {
		mode = os.FileMode(value)
	}
	output := s.kubeconfig
	if output == "" {
		output = kubeconfig
	}
	if err := write(output, string(mustRead(filepath.Join(s.dir, "cred", "admin.kubeconfig"))), mode); err != nil {
		return err
	}
	if output == kubeconfig {
		return nil
	}
	os.MkdirAll(filepath.Dir(kubeconfig), 0o755)
	os.Remove(kubeconfig)
	return os.Symlink(output, kubeconfig)
}

func kubeconfigText(server, ca, certificate string) string {
	encoded := func(file string) string { return base64.StdEncoding.EncodeToString(mustRead(file)) }
	return fmt.Sprintf(`apiVersion: v1
clusters:
- cluster:
    certificate-authority-data: %s
    server: %s
  name: default
contexts:
- context:
    cluster: default
    user: default
  name: default
current-context: default
kind: Config
preferences: {}
users:
- name: default
  user:
    client-certificate-data: %s
    client-key-data: %s
`, encoded(ca), server, encoded(certificate+".crt"), encoded(certificate+".key"))
}

// bringUp starts the components in the order in which they need each other.
func (s *server) bringUp(ctx context.Context, running *processes) error {
	// k3d waits for these two lines of the first of several servers, whose etcd waits for the others.
	say("info", "Containerd is now running")
	say("info", "Running kube-apiserver")
	if err := s.opening.open(ctx); err != nil {
		return err
	}
	datastore, err := s.startDatastore(ctx, running)
	if err != nil {
		return err
	}
	if err := running.start("kube-apiserver", s.apiserver(datastore)...); err != nil {
		return err
	}
	go serveJoining(ctx, s)
	if err := s.waitReady(ctx); err != nil {
		return err
	}
	if s.several() {
		go s.forgetMembers(ctx)
	}
	controller := []string{
		"--kubeconfig=" + s.dir + "/cred/controller.kubeconfig",
		"--authentication-kubeconfig=" + s.dir + "/cred/controller.kubeconfig",
		"--authorization-kubeconfig=" + s.dir + "/cred/controller.kubeconfig",
		"--service-account-private-key-file=" + s.tls + "/service.key",
		"--root-ca-file=" + s.tls + "/server-ca.crt",
		"--cluster-signing-cert-file=" + s.tls + "/client-ca.crt",
		"--cluster-signing-key-file=" + s.tls + "/client-ca.key",
		"--allocate-node-cidrs=true", "--cluster-cidr=" + s.clusterCIDR,
		"--use-service-account-credentials=true", "--controllers=*,tokencleaner",
		"--bind-address=127.0.0.1", "--leader-elect=" + strconv.FormatBool(s.several()),
	}
	if err := running.start("kube-controller-manager", append(controller, dashed(s.controllerArgs)...)...); err != nil {
		return err
	}
	scheduler := []string{
		"--kubeconfig=" + s.dir + "/cred/scheduler.kubeconfig",
		"--authentication-kubeconfig=" + s.dir + "/cred/scheduler.kubeconfig",
		"--authorization-kubeconfig=" + s.dir + "/cred/scheduler.kubeconfig",
		"--bind-address=127.0.0.1", "--leader-elect=" + strconv.FormatBool(s.several()),
	}
	if err := running.start("kube-scheduler", append(scheduler, dashed(s.schedulerArgs)...)...); err != nil {
		return err
	}
	if err := s.deploy(ctx); err != nil {
		return err
	}
	say("info", "k3s is up and running")
	if err := ready(); err != nil {
		return err
	}
	if s.disableAgent {
		return nil
	}
	role := "control-plane,master"
	if s.several() {
		role = "control-plane,etcd,master"
	}
	n := &node{
		name: s.nodeName, address: s.address, roles: role, resolvConf: s.resolvConf, dns: s.clusterDNS,
		domain: s.clusterDomain, kubeconfig: s.dir + "/cred/admin.kubeconfig",
		labels: s.nodeLabels, taints: s.nodeTaints, serveDNS: !slices.Contains(s.disable, "coredns"),
		cidr: s.clusterCIDR, clientCA: s.tls + "/client-ca.crt",
		certificate: s.tls + "/serving-kube-apiserver",
	}
	return n.run(ctx, running)
}

func (s *server) several() bool {
	return s.clusterInit || s.url != "" || exists(filepath.Join(s.dir, "db", "etcd"))
}

func (s *server) apiserver(datastore []string) []string {
	t := s.tls
	arguments := []string{
		"--advertise-address=" + s.address, "--secure-port=6443", "--allow-privileged=true",
		"--authorization-mode=Node,RBAC", "--anonymous-auth=false",
		"--enable-admission-plugins=NodeRestriction", "--client-ca-file=" + t + "/client-ca.crt",
		"--tls-cert-file=" + t + "/serving-kube-apiserver.crt",
		"--tls-private-key-file=" + t + "/serving-kube-apiserver.key",
		"--service-account-key-file=" + t + "/service.key",
		"--service-account-signing-key-file=" + t + "/service.key",
		"--service-account-issuer=https://kubernetes.default.svc." + s.clusterDomain,
		"--api-audiences=https://kubernetes.default.svc." + s.clusterDomain + ",k3s",
		"--service-cluster-ip-range=" + s.serviceCIDR, "--service-node-port-range=" + s.nodePorts,
		"--requestheader-client-ca-file=" + t + "/request-header-ca.crt",
		"--requestheader-allowed-names=system:auth-proxy",
		"--requestheader-extra-headers-prefix=X-Remote-Extra-",
		"--requestheader-group-headers=X-Remote-Group",
		"--requestheader-username-headers=X-Remote-User",
		"--proxy-client-cert-file=" + t + "/client-auth-proxy.crt",
		"--proxy-client-key-file=" + t + "/client-auth-proxy.key", "--profiling=false",
		"--kubelet-client-certificate=" + t + "/client-kube-apiserver.crt",
		"--kubelet-client-key=" + t + "/client-kube-apiserver.key",
	}
	if file := s.dir + "/cred/encryption-config.json"; exists(file) {
		arguments = append(arguments, "--encryption-provider-config="+file)
	}
	return append(append(arguments, datastore...), dashed(s.apiserverArgs)...)
}

// dashed turns the values of --kube-apiserver-arg and its like into arguments.
func dashed(values []string) []string {
	var arguments []string
	for _, value := range values {
		arguments = append(arguments, "--"+strings.TrimLeft(value, "-"))
	}
	return arguments
}

// waitReady waits until the API server says that it is ready.
func (s *server) waitReady(ctx context.Context) error {
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(mustRead(s.tls + "/server-ca.crt"))
	certificate, err := tls.LoadX509KeyPair(s.tls+"/client-admin.crt", s.tls+"/client-admin.key")
	if err != nil {
		return err
	}
	config := &tls.Config{RootCAs: pool, Certificates: []tls.Certificate{certificate}}
	client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{TLSClientConfig: config}}
	for {
		response, err := client.Get("https://127.0.0.1:6443/readyz")
		if err == nil {
			response.Body.Close()
			if response.StatusCode == http.StatusOK {
				return nil
			}
		}
		if err := pause(ctx, 200*time.Millisecond); err != nil {
			return err
		}
	}
}

// joinPort is where a server hands out what a joining node needs. k3s does that on port 6443; here
// that port is the API server's own.
const joinPort = "9345"

// serveJoining answers nodes that know the token: a server gets the shared files, an agent the
// credentials of an administrator.
func serveJoining(ctx context.Context, s *server) {
	mux := http.NewServeMux()
	hand := func(path string, files map[string]string) {
		mux.HandleFunc("GET /"+path, func(w http.ResponseWriter, r *http.Request) {
			if !s.knows(r) {
				http.Error(w, "not authorized", http.StatusUnauthorized)
				return
			}
			bundle := map[string][]byte{}
			for name, file := range files {
				if content, err := os.ReadFile(file); err == nil {
					bundle[name] = content
				}
			}
			json.NewEncoder(w).Encode(bundle)
		})
	}
	forServer := map[string]string{}
	for _, name := range shared {
		forServer[name] = filepath.Join(s.dir, name)
	}
	hand("server", forServer)
	hand("agent", map[string]string{
		"server-ca.crt": s.tls + "/server-ca.crt", "client.crt": s.tls + "/client-admin.crt",
		"client.key": s.tls + "/client-admin.key", "client-ca.crt": s.tls + "/client-ca.crt",
	})
	mux.HandleFunc("PUT /v1-k3s/token", s.rotate)
	listener := &http.Server{Addr: ":" + joinPort, Handler: mux}
	go func() {
		<-ctx.Done()
		listener.Close()
	}()
	err := listener.ListenAndServeTLS(s.tls+"/serving-kube-apiserver.crt", s.tls+"/serving-kube-apiserver.key")
	if !errors.Is(err, http.ErrServerClosed) {
		say("error", "join port: %v", err)
	}
}

// join fetches what a node of this role needs into a directory, from a server that may still start.
func join(ctx context.Context, at, token, role, directory string) error {
	where, err := url.Parse(at)
	if err != nil {
		return err
	}
	// As k3s with a token that names no CA: the server is believed.
	config := &tls.Config{InsecureSkipVerify: true}
	client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{TLSClientConfig: config}}
	for {
		request, err := http.NewRequestWithContext(ctx, "GET", "https://"+net.JoinHostPort(where.Hostname(), joinPort)+"/"+role, nil)
		if err != nil {
			return err
		}
		_, password, found := strings.Cut(token, "::server:")
		if !found {
			password = token
		}
		request.SetBasicAuth("server", password)
		bundle, err := fetch(client, request)
		if err == nil {
			for name, content := range bundle {
				if err := write(filepath.Join(directory, name), string(content), 0o600); err != nil {
					return err
				}
			}
			return nil
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		say("info", "Waiting to retrieve the configuration of %s: %v", at, err)
		if err := pause(ctx, time.Second); err != nil {
			return err
		}
	}
}

func fetch(client *http.Client, request *http.Request) (map[string][]byte, error) {
	response, err := client.Do(request)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		said, _ := io.ReadAll(response.Body)
		return nil, fmt.Errorf("%s: %s", response.Status, strings.TrimSpace(string(said)))
	}
	bundle := map[string][]byte{}
	return bundle, json.NewDecoder(response.Body).Decode(&bundle)
}

func rememberedToken(dir string) string {
	if content, err := os.ReadFile(filepath.Join(dir, "token")); err == nil {
		_, password, _ := strings.Cut(strings.TrimSpace(string(content)), "::server:")
		return password
	}
	random := make([]byte, 16)
	rand.Read(random)
	return hex.EncodeToString(random)
}

// serviceAddress is the n-th address of the services' network.
func serviceAddress(cidr string, n int) (string, error) {
	prefix, err := netip.ParsePrefix(strings.Split(cidr, ",")[0])
	if err != nil {
		return "", err
	}
	address := prefix.Masked().Addr()
	for range n {
		address = address.Next()
	}
	return address.String(), nil
}

// nodeAddress is the node's own, on the network that Docker gave it.
func nodeAddress(given string) (string, error) {
	if given != "" {
		return given, nil
	}
	interfaces, err := net.Interfaces()
	if err != nil {
		return "", err
	}
	for _, one := range interfaces {
		addresses, _ := one.Addrs()
		for _, address := range addresses {
			network, ok := address.(*net.IPNet)
			if ok && strings.HasPrefix(one.Name, "eth") && network.IP.To4() != nil {
				return network.IP.String(), nil
			}
		}
	}
	return "", errors.New("no default routes found in \"/proc/net/route\": the node has no network")
}

func pause(ctx context.Context, duration time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(duration):
		return nil
	}
}

func exists(file string) bool {
	_, err := os.Stat(file)
	return err == nil
}

func mustRead(file string) []byte {
	content, err := os.ReadFile(file)
	if err != nil {
		say("fatal", "%v", err)
		os.Exit(1)
	}
	return content
}

func write(file, content string, mode os.FileMode) error {
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		return err
	}
	if err := os.WriteFile(file, []byte(content), mode); err != nil {
		return err
	}
	return os.Chmod(file, mode)
}
