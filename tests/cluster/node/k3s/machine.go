package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strconv"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"
)

// What follows is for a k3s that is a machine's own, and not a container's: see ../README.md.

const (
	configFile = "/etc/rancher/k3s/config.yaml"
	sealKey    = "/bootstrap"
	registry   = "/registry/"
)

// version is the one that a release's binary bears at its end, else that of the node's image.
func version() string {
	if file, err := os.Open("/proc/self/exe"); err == nil {
		defer file.Close()
		end := make([]byte, 64)
		if size, err := file.Seek(-int64(len(end)), 2); err == nil && size > 0 {
			file.Read(end)
			if _, found, ok := bytes.Cut(end, []byte("K3S_VERSION=")); ok {
				return strings.TrimRight(string(found), "\n")
			}
		}
	}
	content, _ := os.ReadFile(versionInNode)
	return string(content)
}

// configured puts the keys of the config file before the arguments, as flags; an argument wins.
func configured(arguments []string) ([]string, error) {
	file := configFile
	var rest []string
	for _, one := range arguments {
		if name, found := strings.CutPrefix(one, "--config="); found {
			file = name
		} else {
			rest = append(rest, one)
		}
	}
	content, err := os.ReadFile(file)
	if errors.Is(err, os.ErrNotExist) {
		return rest, nil
	}
	if err != nil {
		return nil, err
	}
	values := map[string]any{}
	if err := yaml.Unmarshal(content, &values); err != nil {
		return nil, err
	}
	var flags []string
	for key, value := range values {
		many, ok := value.([]any)
		if !ok {
			many = []any{value}
		}
		for _, one := range many {
			flags = append(flags, fmt.Sprintf("--%s=%v", key, one))
		}
	}
	return append(flags, rest...), nil
}

// seal is what the datastore holds of the token, by which k3s knows another one.
func seal(token string) string {
	digest := sha256.Sum256([]byte(token))
	return hex.EncodeToString(digest[:])
}

// checkSeal refuses a datastore that was made with another token, and seals a new one.
func (s *server) checkSeal(ctx context.Context, client *clientv3.Client) error {
	held, err := client.Get(ctx, sealKey)
	if err != nil {
		return err
	}
	if len(held.Kvs) > 0 && string(held.Kvs[0].Value) != seal(s.token) {
		return errors.New("bootstrap data already found and encrypted with different token")
	}
	_, err = client.Put(ctx, sealKey, seal(s.token))
	return err
}

// knows says whether a request bears the token of now.
func (s *server) knows(r *http.Request) bool {
	s.lock.Lock()
	defer s.lock.Unlock()
	_, token, _ := r.BasicAuth()
	return token == s.token
}

func (s *server) setToken(token string) {
	s.lock.Lock()
	defer s.lock.Unlock()
	s.token = token
}

// ready tells systemd, as a unit of Type=notify wants it.
func ready() error {
	socket := os.Getenv("NOTIFY_SOCKET")
	if socket == "" {
		return nil
	}
	connection, err := net.Dial("unixgram", socket)
	if err != nil {
		return err
	}
	defer connection.Close()
	_, err = connection.Write([]byte("READY=1\n"))
	return err
}

// rotate is `k3s token rotate`.
func (s *server) rotate(w http.ResponseWriter, r *http.Request) {
	if !s.knows(r) {
		http.Error(w, "not authorized", http.StatusUnauthorized)
		return
	}
	var asked struct {
		NewToken string `json:"newToken"`
	}
	if err := json.NewDecoder(r.Body).Decode(&asked); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	if s.several() {
		client, err := s.etcd("https://127.0.0.1:2379")
		if err == nil {
			defer client.Close()
			_, err = client.Put(r.Context(), sealKey, seal(asked.NewToken))
		}
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
	}
	s.setToken(asked.NewToken)
	if err := s.writeToken(); err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
	}
}

// readAll is the content of a datastore behind an etcd API, but for what lives by a lease of etcd.
func readAll(ctx context.Context, client *clientv3.Client) (map[string][]byte, error) {
	all, err := client.Get(ctx, registry, clientv3.WithPrefix())
	if err != nil {
		return nil, err
	}
	content := map[string][]byte{}
	for _, one := range all.Kvs {
		if one.Lease == 0 {
			content[string(one.Key)] = one.Value
		}
	}
	return content, nil
}

// readSQLite is the content of the SQLite that is to become etcd; nothing where there is none.
func (s *server) readSQLite(ctx context.Context) (map[string][]byte, error) {
	if !exists(filepath.Join(s.dir, "db", "state.db")) {
		return nil, nil
	}
	say("info", "Migrating content from sqlite to etcd")
	running := newProcesses()
	work, stop := context.WithCancel(ctx)
	defer func() {
		stop()
		running.wait(work)
	}()
	if err := s.startKine(ctx, running); err != nil {
		return nil, err
	}
	client, err := clientv3.New(clientv3.Config{
		Endpoints: []string{"unix://" + s.dir + "/kine.sock"}, DialTimeout: 5 * time.Second,
	})
	if err != nil {
		return nil, err
	}
	defer client.Close()
	return readAll(ctx, client)
}

func writeAll(ctx context.Context, client *clientv3.Client, content map[string][]byte) error {
	for key, value := range content {
		if _, err := client.Put(ctx, key, string(value)); err != nil {
			return err
		}
	}
	return nil
}

// snapshotOptions are what `k3s etcd-snapshot` is told, by its config file too.
func snapshotOptions(arguments []string) (map[string]string, error) {
	flags, err := configured(arguments)
	options := map[string]string{"data-dir": "/var/lib/rancher/k3s", "name": "on-demand"}
	options["node-name"], _ = os.Hostname()
	for _, flag := range flags {
		name, value, _ := strings.Cut(strings.TrimLeft(flag, "-"), "=")
		options[name] = value
	}
	if options["etcd-snapshot-dir"] == "" {
		options["etcd-snapshot-dir"] = options["data-dir"] + "/server/db/snapshots"
	}
	return options, err
}

// etcdSnapshot is `k3s etcd-snapshot`: a snapshot is a file of all keys and values.
func etcdSnapshot(ctx context.Context, arguments []string) error {
	if len(arguments) == 0 {
		return errors.New("no subcommand")
	}
	told, err := snapshotOptions(arguments[1:])
	if err != nil {
		return err
	}
	s := &server{options: &options{nodeName: told["node-name"]}, dir: told["data-dir"] + "/server"}
	s.tls = s.dir + "/tls"
	directory := told["etcd-snapshot-dir"]
	files, _ := filepath.Glob(directory + "/*")
	sort.Strings(files)
	switch arguments[0] {
	case "save":
		if !exists(s.dir + "/db/etcd/member") {
			return errors.New("etcd datastore disabled")
		}
		client, err := s.etcd("https://127.0.0.1:2379")
		if err != nil {
			return err
		}
		defer client.Close()
		content, err := readAll(ctx, client)
		if err != nil {
			return err
		}
		held, err := client.Get(ctx, sealKey)
		if err != nil {
			return err
		}
		for _, one := range held.Kvs {
			content[sealKey] = one.Value
		}
		text, err := json.Marshal(content)
		if err != nil {
			return err
		}
		name := fmt.Sprintf("%s-%s-%d", told["name"], told["node-name"], time.Now().Unix())
		return write(filepath.Join(directory, name), string(text), 0o600)
	case "ls":
		fmt.Println("Name Location Size Created")
		for _, file := range files {
			seen, err := os.Stat(file)
			if err != nil {
				return err
			}
			fmt.Printf("%s file://%s %d %s\n", filepath.Base(file), file, seen.Size(),
				seen.ModTime().UTC().Format(time.RFC3339))
		}
		return nil
	case "prune":
		keep, err := strconv.Atoi(told["snapshot-retention"])
		if err != nil {
			return err
		}
		files = slices.DeleteFunc(files, func(file string) bool {
			return !strings.HasPrefix(filepath.Base(file), told["name"]+"-")
		})
		for len(files) > keep {
			if err := os.Remove(files[0]); err != nil {
				return err
			}
			files = files[1:]
		}
		return nil
	}
	return fmt.Errorf("No help topic for %q", arguments[0])
}

// reset is `k3s server --cluster-reset`: a new etcd of one member with a snapshot's content.
func (s *server) reset(ctx context.Context) error {
	content := map[string][]byte{}
	if err := json.Unmarshal(mustRead(s.restorePath), &content); err != nil {
		return err
	}
	if held := string(content[sealKey]); held != "" && held != seal(s.token) {
		return errors.New("failed to decrypt bootstrap data: the token is another")
	}
	etcd := filepath.Join(s.dir, "db", "etcd")
	os.RemoveAll(etcd + "-old")
	if exists(etcd) {
		if err := os.Rename(etcd, etcd+"-old"); err != nil {
			return err
		}
	}
	running := newProcesses()
	work, stop := context.WithCancel(ctx)
	s.url, s.clusterInit = "", true
	_, err := s.startEtcd(ctx, running)
	if err == nil {
		var client *clientv3.Client
		if client, err = s.etcd("https://127.0.0.1:2379"); err == nil {
			err = writeAll(ctx, client, content)
			client.Close()
		}
	}
	stop()
	running.wait(work)
	if err == nil {
		say("info", "Managed etcd cluster membership has been reset, restart without --cluster-reset flag now.")
	}
	return err
}

// memberFinalizer holds a server's Node until it is out of etcd, so that `kubectl delete node` waits
// for that (k3s' etcd member controller).
const memberFinalizer = "wrangler.cattle.io/managed-etcd-controller"

// forgetMembers removes from etcd the servers whose Nodes are deleted, as k3s does.
func (s *server) forgetMembers(ctx context.Context) {
	client, err := clientOf(s.dir + "/cred/admin.kubeconfig")
	if err != nil {
		return
	}
	servers := metav1.ListOptions{LabelSelector: "node-role.kubernetes.io/etcd"}
	for pause(ctx, time.Second) == nil {
		nodes, err := client.CoreV1().Nodes().List(ctx, servers)
		if err != nil {
			continue
		}
		for _, one := range nodes.Items {
			held := slices.Contains(one.Finalizers, memberFinalizer)
			if held == (one.DeletionTimestamp == nil) {
				continue
			}
			if !held {
				one.Finalizers = append(one.Finalizers, memberFinalizer)
			} else if err := s.removeMember(ctx, one.Name); err == nil {
				one.Finalizers = slices.DeleteFunc(one.Finalizers, func(name string) bool { return name == memberFinalizer })
			} else {
				say("error", "Removing %s from etcd: %v", one.Name, err)
				continue
			}
			if _, err := client.CoreV1().Nodes().Update(ctx, &one, metav1.UpdateOptions{}); err != nil {
				say("info", "Updating Node %s: %v", one.Name, err)
			}
		}
	}
}

// removeMember takes a server out of etcd; one of several leaves itself to the others.
func (s *server) removeMember(ctx context.Context, name string) error {
	members, err := s.etcd("https://127.0.0.1:2379")
	if err != nil {
		return err
	}
	defer members.Close()
	listed, err := members.MemberList(ctx)
	if err != nil {
		return err
	}
	if name == s.nodeName && len(listed.Members) > 1 {
		return errors.New("another server does it")
	}
	for _, one := range listed.Members {
		if one.Name == name && name != s.nodeName {
			say("info", "Removing %s from etcd", name)
			if _, err := members.MemberRemove(ctx, one.ID); err != nil {
				return err
			}
		}
	}
	return nil
}
