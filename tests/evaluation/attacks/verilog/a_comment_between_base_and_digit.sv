assign q = 1;
initial begin case (1'b/**/1_force a = 0; endcase end
endmodule
